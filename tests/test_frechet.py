import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tim.data.digits import digits
from tim.frechet import frechet_distance, train_classifier


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(0, 100))
def test_diagonal_gaussians_have_the_closed_form(width, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(400, width, generator=generator, dtype=torch.float64)
    rows = rows - rows.mean(0)
    rows = rows @ torch.linalg.inv(
        torch.linalg.cholesky(torch.atleast_2d(rows.T.cov()), upper=True)
    )
    mean, std_a, std_b = torch.rand(3, width, generator=generator, dtype=torch.float64) + 0.1
    expected = mean.square().sum() + (std_a - std_b).square().sum()
    distance = frechet_distance(rows * std_a, rows * std_b + mean)
    assert distance == pytest.approx(expected.item(), rel=1e-6)


def test_equal_sets_have_no_distance_and_order_does_not_matter():
    a, b = torch.randn(50, 7), torch.randn(60, 7) * 2 + 1
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-8)


def test_fewer_rows_than_features_is_no_problem():
    assert frechet_distance(torch.randn(3, 10), torch.randn(4, 10)) > 0


@pytest.mark.parametrize("shape", [(1, 4), (5,), (5, 3)])
def test_bad_input(shape):
    with pytest.raises(ValueError, match=r"b must have shape \[N >= 2, 4\], got"):
        frechet_distance(torch.randn(5, 4), torch.randn(shape))


def test_classifier_learns_the_digits_and_is_reproducible():
    train, held_out = digits("train"), digits("test")
    one, two = (train_classifier(train.images, train.labels, 10, steps=150) for _ in range(2))
    assert one.accuracy(held_out.images, held_out.labels) > 0.9
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    features = one.features(held_out.images)
    noise = one.features(torch.randn(300, 1, 8, 8))
    real = frechet_distance(one.features(train.images), features)
    assert real < frechet_distance(noise, features) / 10
