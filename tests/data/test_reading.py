"""Batches read ahead, in a thread and by worker processes that may die."""

import logging
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tim.data import ArrayDataset, Batch, BatchOrder, Dataset, DataWorkerDied, batches, reading
from tim.data.folder import FolderDataset


def ramp(flip: float = 0.5) -> ArrayDataset:
    images = np.arange(30 * 2 * 2, dtype=np.float32).reshape(30, 1, 2, 2)
    return ArrayDataset(images, np.arange(30), num_classes=30, flip=flip)


def test_batches_are_the_same_wherever_one_starts() -> None:
    order = BatchOrder(30, 8, seed=5)
    whole = list(batches(ramp(), order, 0, 12))
    tail = list(batches(ramp(), order, 7, 12))
    assert len(whole) == 12 and len(tail) == 5
    for a, b in zip(whole[7:], tail, strict=True):
        assert a.x.equal(b.x) and a.y.equal(b.y)
    flipped = [(b.x[:, 0, 0, 0] > b.x[:, 0, 0, 1]).float().mean() for b in whole]
    assert 0.25 < sum(flipped) / 12 < 0.75
    assert len({f.item() for f in flipped}) > 1


class Slow(Dataset):
    """Notes which batches were asked for, in a data set that is read ahead."""

    shape, num_classes, prefetch = (1, 1, 1), 1, 3

    def __init__(self, fail_at: int | None = None) -> None:
        self.data, self.asked, self.fail_at = ramp(0), [], fail_at

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: np.ndarray, rng: np.random.Generator) -> Batch:
        self.asked.append(indices.tolist())
        if len(self.asked) == self.fail_at:
            raise ValueError("broken")
        return self.data.batch(indices, rng)


def test_reading_ahead_keeps_the_order() -> None:
    order, dataset = BatchOrder(30, 7, seed=0), Slow()
    stream = batches(dataset, order, 2, 9)
    assert next(stream).y.tolist() == order.indices(2).tolist()
    rest = [batch.y.tolist() for batch in stream]
    assert rest == [order.indices(step).tolist() for step in range(3, 9)]
    assert len(dataset.asked) == 7


def test_errors_in_the_reading_thread_arrive() -> None:
    stream = batches(Slow(fail_at=3), BatchOrder(30, 7, seed=0), 0, 9)
    next(stream), next(stream)
    with pytest.raises(ValueError, match="broken"):
        next(stream)


def pictures(folder: Path, count: int = 12) -> Path:
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    (folder / "05.png").write_bytes(b"no picture")
    return folder


def workers() -> list[int]:
    return [process.pid for process in multiprocessing.active_children()]


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        p.x.equal(q.x) and p.y.equal(q.y) for p, q in zip(a, b, strict=True)
    )


class Murderous(FolderDataset):
    """In a worker process, some images kill, or raise what is no fault of theirs."""

    kills: tuple[int, ...] = ()
    raises_at: int | None = None

    def _load(self, index: int) -> np.ndarray:
        if index in self.kills and self._pool is None:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super()._load(index)

    def batch(self, indices: np.ndarray, *others) -> Batch:
        if self.raises_at in indices:
            raise ValueError("out of\npatience")
        return super().batch(indices, *others)


def test_processes_make_the_same_batches_and_one_that_is_killed_is_replaced(tmp_path, caplog):
    path = pictures(tmp_path / "data")
    order = BatchOrder(12, 5, seed=3)
    rows = np.array([0, 3, 4])
    expected = list(batches(FolderDataset(path, 8, flip=0.5), order, 2, 14, rows))
    dataset = FolderDataset(path, 8, flip=0.5)
    stream = batches(dataset, order, 2, 14, rows, processes=2)
    found = [next(stream), next(stream)]
    victims = workers()
    assert len(victims) == 2
    os.kill(victims[1], signal.SIGKILL)
    found += list(stream)
    assert same(found, expected)
    # What they could not read is known here too.
    assert list(dataset.skipped) == ["05.png"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("data worker ")
    assert f"(process {victims[1]}) died of SIGKILL" in record.getMessage()
    assert not workers()


def test_an_image_that_kills_twice_is_skipped(tmp_path, caplog):
    path = pictures(tmp_path / "data")
    dataset = Murderous(path, 8)
    dataset.kills = (7,)
    order = BatchOrder(12, 6, seed=0)
    found = list(batches(dataset, order, 0, 4, processes=1))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and all("died of SIGSEGV while it read 07.png" in line for line in told)
    assert "it killed data workers: (process " in dataset.skipped["07.png"]
    # The next image takes its place, as that of one that cannot be decoded.
    plain = FolderDataset(path, 8)
    plain.skip({7: "left out"})
    assert same(found, list(batches(plain, order, 0, 4)))


def test_processes_that_go_on_dying_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_DEATHS", 1)
    dataset = Murderous(pictures(tmp_path / "data"), 8)
    dataset.kills = tuple(range(12))
    stream = batches(dataset, BatchOrder(12, 6, seed=0), 0, 4, processes=1)
    expected = (
        r"^data worker 0 \(process \d+\) died of SIGSEGV while it read \d\d.png; 1 died without"
    )
    with pytest.raises(DataWorkerDied, match=expected):
        next(stream)


def test_errors_in_a_process_arrive_in_one_line(tmp_path):
    dataset = Murderous(pictures(tmp_path / "data"), 8)
    order = BatchOrder(12, 6, seed=0)
    dataset.raises_at = int(order.indices(1)[0])
    stream = batches(dataset, order, 0, 2, processes=1)
    next(stream)
    with pytest.raises(ValueError, match=r"^data worker 0: ValueError: out of patience$"):
        next(stream)
