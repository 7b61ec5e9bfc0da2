import numpy as np
import pytest

from tim.data.bucket_order import BucketOrder

SIZES = np.array([0] * 10 + [1] * 3 + [2] * 8)


def test_batches_are_of_one_size_and_every_image_comes():
    order = BucketOrder(SIZES, 4, seed=3)
    assert order.steps_per_epoch == 3 + 1 + 2
    for epoch in range(3):
        steps = range(epoch * 6, (epoch + 1) * 6)
        batches = [order.indices(step) for step in steps]
        assert all(len(batch) == 4 and len(set(SIZES[batch])) == 1 for batch in batches)
        counts = np.bincount(np.concatenate(batches), minlength=len(SIZES))
        # 12 places for 10 images, 4 for 3, 8 for 8.
        assert counts.min() == 1 and counts.max() <= 2 and counts.sum() == 24
        assert (counts[SIZES == 2] == 1).all()


def test_sizes_are_shuffled():
    order = BucketOrder(SIZES, 2, seed=0)
    rows = [tuple(SIZES[order.epoch(e)[:, 0]]) for e in range(4)]
    assert len(set(rows)) == 4 and all(list(row) != sorted(row) for row in rows)


def test_a_step_follows_from_seed_and_number_alone():
    forward = [BucketOrder(SIZES, 4, 1).indices(step).tolist() for step in range(20)]
    order = BucketOrder(SIZES, 4, 1)
    assert [order.indices(step).tolist() for step in reversed(range(20))] == forward[::-1]
    assert [BucketOrder(SIZES, 4, 2).indices(step).tolist() for step in range(20)] != forward


def test_small_buckets_repeat_their_images():
    counts = np.bincount(BucketOrder(np.zeros(2, int), 5, 0).indices(0))
    assert sorted(counts) == [2, 3]


def test_mistakes():
    with pytest.raises(ValueError, match="must be images and batch_size at least 1, got 0, 4"):
        BucketOrder(np.empty(0, int), 4, 0)
