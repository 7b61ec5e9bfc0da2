"""The order of images: a function of seed and step."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tim.data import BatchOrder, WindowOrder
from tim.parallel.spread import Spread


@given(length=st.integers(1, 40), batch_size=st.integers(1, 90), seed=st.integers(0, 2**40))
def test_every_image_comes_once_per_epoch(length: int, batch_size: int, seed: int) -> None:
    order = BatchOrder(length, batch_size, seed)
    epochs = 3
    row = np.concatenate([order.indices(s) for s in range(-(-epochs * length // batch_size))])
    for epoch in range(epochs):
        part = row[epoch * length : (epoch + 1) * length]
        assert sorted(part) == list(range(length))
        np.testing.assert_array_equal(part, BatchOrder(length, 1, seed).permutation(epoch))


@given(steps=st.lists(st.integers(0, 50), min_size=1, max_size=10))
def test_a_step_does_not_depend_on_the_steps_before(steps: list[int]) -> None:
    fresh = {step: BatchOrder(17, 5, seed=3).indices(step) for step in steps}
    order = BatchOrder(17, 5, seed=3)
    for step in steps:
        np.testing.assert_array_equal(order.indices(step), fresh[step])


def test_epochs_and_seeds_differ() -> None:
    order, other = BatchOrder(100, 100, seed=0), BatchOrder(100, 100, seed=1)
    assert (order.indices(0) != order.indices(1)).any()
    assert (order.indices(0) != other.indices(0)).any()


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        BatchOrder(0, 4, seed=0)


def rows(rank: int, ranks: int, batch: int, parts: int) -> np.ndarray:
    """Rows of a batch that the trainer has a rank read."""
    spread = SimpleNamespace(world=SimpleNamespace(rank=rank, size=ranks))
    mine = Spread.rows(spread, batch, parts)
    return np.arange(batch) if mine is None else mine


@given(data=st.data())
def test_windows_bring_every_image_once_per_epoch_whoever_reads(data: st.DataObject) -> None:
    """Ranks, each with some workers, stop at any step and go on as other ranks and workers."""
    shards = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any), "shards")
    window, seed = data.draw(st.integers(1, 4), "window"), data.draw(st.integers(0, 99), "seed")
    phases = [
        (data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 3))) for _ in range(2)
    ]
    parts = data.draw(st.sampled_from([1, 2]), "parts")
    batch = data.draw(st.sampled_from([8, 16, 24]), "batch")
    images, epochs = sum(shards), 2
    steps = -(-epochs * images // batch)
    stop = data.draw(st.integers(0, steps), "stop")
    seen = np.full((steps, batch), -1)
    for (ranks, workers), span in zip(phases, (range(stop), range(stop, steps)), strict=True):
        for rank in range(ranks):
            mine = rows(rank, ranks, batch, parts)
            for worker in range(workers):
                order = WindowOrder(shards, batch, seed, window)
                for step in span[worker::workers]:
                    assert (seen[step, mine] == -1).all()
                    seen[step, mine] = order.indices(step)[mine]
    row = seen.reshape(-1)
    for epoch in range(epochs):
        assert sorted(row[epoch * images : (epoch + 1) * images]) == list(range(images))


def test_ranks_read_shards_of_their_own_evenly_and_a_window_at_a_time() -> None:
    rng = np.random.default_rng(0)
    shards = rng.integers(60, 140, 64).tolist()  # uneven
    shard_of = np.repeat(np.arange(64), shards)
    order = WindowOrder(shards, 64, seed=1, window=4)
    assert order.lanes == 16
    steps = range(2 * order.length // 64)
    whole = BatchOrder(order.length, 64, seed=1)
    for ranks in (2, 4, 8, 16):
        for rank in range(ranks):
            mine = rows(rank, ranks, 64, 2)
            read = np.stack([shard_of[order.indices(step)[mine]] for step in steps])
            epoch = read[: len(read) // 2]
            # Its share, those that it has in common with others at the cuts, and the rest that
            # ends an epoch.
            share = 64 / ranks
            assert len(np.unique(epoch)) <= 1.3 * share + 2 * order.lanes / ranks + 1
            few = np.unique(read[:8])
            assert len(few) <= (4 + 2) * order.lanes / ranks
    everywhere = [shard_of[whole.indices(step)] for step in steps[: len(steps) // 2]]
    assert len(np.unique(everywhere)) == 64


def test_windows_shuffle() -> None:
    shards = [50] * 40
    order = WindowOrder(shards, 20, seed=0, window=2)
    first, second = order.permutation(0).copy(), order.permutation(1).copy()
    assert (first != second).mean() > 0.9
    assert (WindowOrder(shards, 20, seed=1, window=2).permutation(0) != first).mean() > 0.9
    # In a lane, neighbours come from both shards of the window, in no order.
    lane = first[:: order.lanes]
    assert 0.3 < (np.diff(lane) > 0).mean() < 0.7
    assert len(np.unique(lane[:50] // 50)) >= 2


def test_windows_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        WindowOrder([3], 4, seed=0, window=0)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        WindowOrder([0, 0], 4, seed=0, window=1)
