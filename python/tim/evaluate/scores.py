"""Scores of features of samples: FID, KID and Inception Score, computed by torchmetrics."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tim.evaluate.networks import EXTRA
from tim.evaluate.precision_recall import NEIGHBOURS, precision_recall

#: What can be computed against reference images, in the order in which it is shown.
METRICS = ("fid", "kid", "precision", "recall")
KID_SUBSET, KID_SUBSETS = 1000, 100
INCEPTION_SPLITS = 10
_ROWS = 4096


@dataclass(frozen=True)
class Statistics:
    """What is known of the reference images: features [N, D], or their mean [D] and covariance."""

    features: Tensor | None = None
    mean: Tensor | None = None
    covariance: Tensor | None = None

    @property
    def width(self) -> int:
        known = self.features if self.features is not None else self.mean
        assert known is not None
        return known.shape[-1]


def scores(
    reference: Statistics,
    features: Tensor,
    metrics: tuple[str, ...],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Of features [N, D] of samples, the `metrics` out of METRICS; with kid also kid_std.

    Precomputed moments, where the reference has them, take precedence in FID; the other metrics
    need its features.

    Args:
        seed: of the subsets of KID.
        device: to compute all but FID on.

    Raises:
        ImportError: torchmetrics is missing (names the extra).
    """
    found: dict[str, float] = {}
    if "fid" in metrics:
        found["fid"] = fid(reference, features)
    if not set(metrics) - {"fid"}:
        return found
    real, features = reference.features.to(device), features.to(device)
    if "kid" in metrics:
        found["kid"], found["kid_std"] = kid(real, features, seed=seed)
    if "precision" in metrics or "recall" in metrics:
        both = precision_recall(real, features)
        found |= {n: v for n, v in zip(METRICS[2:], both, strict=True) if n in metrics}
    return found


def check_counts(metrics: tuple[str, ...], what: str, count: int, width: int) -> None:
    """ValueError when `count` images, called `what`, are too few for the metrics."""
    least = {"kid": 2, "precision": NEIGHBOURS + 1, "recall": NEIGHBOURS + 1, "fid": width + 1}
    for metric, needed in least.items():
        if metric in metrics and count < needed:
            others = ",".join(m for m in metrics if count >= least[m])
            remedy = f" (--metrics {others} takes fewer)" if others else ""
            why = f": the covariance of {width} features" if metric == "fid" else ""
            raise ValueError(
                f"{what} must be at least {needed} for {metric}{why}, got {count}{remedy}"
            )


def fid(reference: Statistics, features: Tensor) -> float:
    """Frechet distance between the Gaussians of both sets (arXiv 1706.08500)."""
    metric = _metric("fid", "FrechetInceptionDistance", _Given(features.shape[1]))
    if reference.mean is not None:
        # torchmetrics keeps sums: those of two images that have these moments.
        mean, count = reference.mean.double().cpu(), 2
        metric.real_features_sum = mean * count
        metric.real_features_cov_sum = reference.covariance.double().cpu() * (
            count - 1
        ) + count * torch.outer(mean, mean)
        metric.real_features_num_samples = torch.tensor(count)
    else:
        for rows in reference.features.cpu().split(_ROWS):
            metric.update(rows, real=True)
    for rows in features.cpu().split(_ROWS):
        metric.update(rows, real=False)
    return max(metric.compute().item(), 0.0)


def kid(real: Tensor, features: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """Squared maximum mean discrepancy of the polynomial kernel (arXiv 1801.01401), its mean and
    deviation over subsets of at most 1000 images."""
    size = min(KID_SUBSET, len(real), len(features))
    options = {"subset_size": size, "subsets": KID_SUBSETS}
    metric = _metric("kid", "KernelInceptionDistance", _Given(features.shape[1]), **options)
    metric.update(real, real=True)
    metric.update(features, real=False)
    with _seeded(seed):
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


def inception_score(logits: Tensor, *, seed: int = 0) -> float:
    """exp(mean KL(p(y|x) | p(y))) of class logits [N, K], mean over ten parts (arXiv 1606.03498).

    Raises ValueError for fewer than ten samples.
    """
    if len(logits) < INCEPTION_SPLITS:
        raise ValueError(
            f"samples must be at least {INCEPTION_SPLITS} for the Inception Score, "
            f"got {len(logits)}"
        )
    metric = _metric("inception", "InceptionScore", _Given(), splits=INCEPTION_SPLITS)
    metric.update(logits)
    with _seeded(seed):
        return metric.compute()[0].item()


class _Given(nn.Module):
    """Stands in for a network whose outputs are there already."""

    def __init__(self, width: int = 0) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def check_torchmetrics() -> None:
    """ImportError, naming the extra, when torchmetrics is missing."""
    try:
        import torchmetrics  # noqa: F401
    except ImportError:
        raise ImportError(f"FID and KID need torchmetrics: pip install '{EXTRA}'") from None


def _metric(module: str, name: str, feature: nn.Module, **options: Any) -> Any:
    check_torchmetrics()

    with warnings.catch_warnings():
        # That it keeps features in memory, which we know.
        warnings.simplefilter("ignore", UserWarning)
        made = getattr(importlib.import_module(f"torchmetrics.image.{module}"), name)
        return made(feature=feature, **options)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torchmetrics draws from the global generator of the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
