import pytest
import torch

from tim.evaluate import precision_recall as module
from tim.evaluate.precision_recall import precision_recall


def by_definition(real, samples, k):
    """Loops over all pairs, as the paper writes it."""

    def among(queries, points):
        radii = [sorted((p - q).norm().item() for q in points)[k] for p in points]
        inside = [
            any((query - p).norm() <= r for p, r in zip(points, radii, strict=True))
            for query in queries
        ]
        return sum(inside) / len(inside)

    return among(samples, real), among(real, samples)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shift", [0.0, 0.7, 50.0])
def test_agrees_with_the_definition_in_any_blocks(k, shift, monkeypatch):
    generator = torch.Generator().manual_seed(k)
    real = torch.randn(40, 4, generator=generator, dtype=torch.float64) + 30
    samples = torch.randn(25, 4, generator=generator, dtype=torch.float64) + 30 + shift
    expected = by_definition(real, samples, k)
    assert shift == 50 or 0 < expected[0] < 1
    for block in (1, 7, 1000):
        monkeypatch.setattr(module, "BLOCK", block)
        assert precision_recall(real, samples, neighbours=k) == expected


def test_samples_of_one_mode_are_precise_and_do_not_cover_the_other():
    generator = torch.Generator().manual_seed(0)
    modes = torch.randn(2, 200, 8, generator=generator) + torch.tensor([0.0, 40.0])[:, None, None]
    samples = torch.randn(200, 8, generator=generator)
    precision, recall = precision_recall(modes.flatten(0, 1), samples)
    assert precision > 0.8 and 0.35 < recall <= 0.5
    backwards = precision_recall(samples, modes.flatten(0, 1))
    assert backwards == (recall, precision)


def test_far_from_zero_nothing_is_lost():
    real, samples = torch.randn(60, 5), torch.randn(60, 5)
    near = precision_recall(real.double(), samples.double())
    far = precision_recall(real + 1000, samples + 1000)
    assert far == pytest.approx(near, abs=0.05)


def test_bad_input():
    with pytest.raises(ValueError, match=r"samples must have shape \[N, 4\], got \[9, 5\]"):
        precision_recall(torch.randn(9, 4), torch.randn(9, 5))
    with pytest.raises(ValueError, match="real must have more rows than neighbours, 3, got 3"):
        precision_recall(torch.randn(3, 4), torch.randn(9, 4))
