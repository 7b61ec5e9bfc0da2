import math

import pytest
import torch

pytest.importorskip("torchmetrics")

from tim.evaluate.scores import (
    METRICS,
    Statistics,
    check_counts,
    fid,
    inception_score,
    kid,
    scores,
)
from tim.frechet import frechet_distance


@pytest.fixture(scope="module")
def sets():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(300, 6, generator=generator), torch.randn(200, 6, generator=generator) + 0.4


def test_fid_is_the_frechet_distance(sets):
    real, samples = sets
    expected = frechet_distance(real, samples)
    assert fid(Statistics(real), samples) == pytest.approx(expected, rel=1e-4)
    assert fid(Statistics(real), real) == pytest.approx(0, abs=1e-4)


def test_fid_of_given_moments_is_that_of_their_images(sets):
    real, samples = sets
    moments = Statistics(None, real.double().mean(0), real.double().T.cov())
    assert fid(moments, samples) == pytest.approx(fid(Statistics(real), samples), rel=1e-5)
    # Moments of all the images take precedence over those of the few that come with them.
    both = Statistics(real[:20], moments.mean, moments.covariance)
    assert fid(both, samples) == fid(moments, samples)


def test_kid_is_the_unbiased_discrepancy(sets):
    real, samples = (x.double() for x in sets)
    real = real[: len(samples)]
    n, width = samples.shape
    a, b, ab = (
        (x @ y.T / width + 1) ** 3 for x, y in ((real, real), (samples, samples), (real, samples))
    )
    expected = sum((m.sum() - m.trace()) / (n * (n - 1)) for m in (a, b)) - 2 * ab.mean()
    mean, deviation = kid(real, samples)
    # All subsets are the whole set.
    assert mean == pytest.approx(expected.item(), rel=1e-9) and deviation < 1e-9


def test_kid_draws_its_subsets_by_the_seed(sets, monkeypatch):
    monkeypatch.setattr("tim.evaluate.scores.KID_SUBSET", 50)
    state = torch.get_rng_state()
    assert kid(*sets, seed=1) == kid(*sets, seed=1) != kid(*sets, seed=2)
    assert torch.get_rng_state().equal(state)


def test_inception_score_counts_the_classes():
    sure = 60 * torch.eye(4).repeat_interleave(500, 0)
    assert inception_score(sure) == pytest.approx(4, rel=0.02)
    assert inception_score(torch.zeros(50, 4)) == pytest.approx(1)
    with pytest.raises(ValueError, match="samples must be at least 10 for the Inception Score"):
        inception_score(torch.zeros(9, 4))


def test_only_what_was_asked_for(sets):
    reference = Statistics(sets[0])
    assert list(scores(reference, sets[1], METRICS)) == [
        "fid", "kid", "kid_std", "precision", "recall",
    ]  # fmt: skip
    assert list(scores(reference, sets[1], ("recall",))) == ["recall"]
    values = scores(reference, sets[1], METRICS)
    assert all(math.isfinite(value) for value in values.values())


def test_too_few_images():
    check_counts(METRICS, "samples", 7, 6)
    with pytest.raises(ValueError, match="samples must be at least 7 for fid: the covariance of 6"):
        check_counts(METRICS, "samples", 6, 6)
    with pytest.raises(ValueError, match=r"got 3 \(--metrics kid takes fewer\)"):
        check_counts(METRICS, "samples", 3, 6)
    with pytest.raises(ValueError, match="reference images must be at least 2 for kid, got 1"):
        check_counts(("kid",), "reference images", 1, 6)
