"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


def ema_weight(
    images_seen: int,
    batch_size: int,
    *,
    decay: float,
    halflife_images: int | None = None,
    rampup: float = 0.05,
) -> float:
    """Share w of the new weights in ema <- (1 - w) ema + w new after a step of `batch_size` images.

    w = 1 - decay, or with a half-life in images w = 1 - 2^(-batch_size / halflife), which does not
    depend on the batch size chosen. `rampup` > 0 limits the half-life to that share of the images
    seen so far (this step's included), so that the random first weights are soon forgotten (the
    scheme of EDM2, arXiv 2312.02696).
    """
    if halflife_images is not None:
        decay = 0.5 ** (batch_size / halflife_images)
    if rampup > 0:
        decay = min(decay, 0.5 ** (batch_size / (rampup * images_seen)))
    return 1 - decay


class EMA:
    """`model` is the average: a copy of the module given, in evaluation mode, without gradients."""

    def __init__(self, source: nn.Module):
        self.model = copy.deepcopy(source).eval().requires_grad_(False)
        self._averages = list(self.model.parameters())
        self._buffers = list(self.model.buffers())

    @torch.no_grad()
    def update(self, source: nn.Module, weight: float) -> None:
        """ema <- (1 - weight) ema + weight source; buffers are copied."""
        torch._foreach_lerp_(self._averages, list(source.parameters()), weight)
        for average, buffer in zip(self._buffers, source.buffers(), strict=True):
            average.copy_(buffer)
