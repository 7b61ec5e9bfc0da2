"""Packed batches within a budget of tokens."""

import numpy as np
import pytest

from tim.data.token_order import TokenOrder

TOKENS = [256, 96, 1024, 17]


def order(
    n=500, budget=2048, most=64, multiple=1, parts=1, seed=3
) -> tuple[TokenOrder, np.ndarray]:
    size_of = np.random.default_rng(0).choice(4, n, p=[0.5, 0.2, 0.1, 0.2])
    return TokenOrder(size_of, TOKENS, budget, most, seed, multiple, parts), np.take(
        TOKENS, size_of
    )


@pytest.mark.parametrize("n", [1, 7, 500])
@pytest.mark.parametrize(("multiple", "parts"), [(1, 1), (4, 1), (4, 2), (6, 3)])
def test_no_batch_and_no_share_is_over_the_budget(n, multiple, parts):
    budget = 2048 * multiple
    found, tokens = order(n, budget, 60, multiple, parts)
    seen = []
    for step in range(2 * found.steps_per_epoch):
        images = found.indices(step)
        assert 0 < len(images) <= 60 and len(images) % multiple == 0
        shares = tokens[images].reshape(parts, -1, multiple // parts).sum(1)
        assert shares.max() <= budget // multiple
        seen.append(images)
    for epoch in (seen[: found.steps_per_epoch], seen[found.steps_per_epoch :]):
        counts = np.bincount(np.concatenate(epoch), minlength=n)
        assert counts.min() >= 1 and counts.sum() < n + multiple
    assert found.images_per_step == pytest.approx(np.mean([len(images) for images in seen]))


def test_batches_are_full_and_of_mixed_sizes():
    """No batch could take the largest image as well, but for the last one of the cut."""
    found, tokens = order(most=10**6)
    sums = [tokens[found.indices(step)].sum() for step in range(found.steps_per_epoch)]
    assert sorted(sums)[1] > 2048 - 1024
    assert np.mean(sums) > 0.8 * 2048
    assert all(len(set(tokens[found.indices(step)])) > 1 for step in range(5))
    few, _ = order(most=3)
    assert {len(few.indices(step)) for step in range(few.steps_per_epoch)} == {2, 3}


def test_follows_from_seed_and_step():
    one, other = order()[0], order()[0]
    last = 3 * one.steps_per_epoch
    forward = [one.indices(step) for step in range(last)]
    for step in reversed(range(last)):
        np.testing.assert_array_equal(other.indices(step), forward[step])
    first, second = forward[: one.steps_per_epoch], forward[one.steps_per_epoch :]
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(first, second, strict=False))
    assert not np.array_equal(order(seed=4)[0].indices(0), forward[0])


def test_what_cannot_be_is_told():
    with pytest.raises(ValueError, match=r"data\.token_budget must hold .* 1024 tokens, got 1000"):
        order(budget=1000)
    with pytest.raises(ValueError, match=r"1024 tokens for each of 4 shares .*, got 4000"):
        order(budget=4000, multiple=4)
    with pytest.raises(ValueError, match="there must be images, got 0"):
        order(n=0)
