"""The order of images: a function of seed and step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tim.data import ArrayDataset, Batch, BatchOrder, Dataset, batches


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
