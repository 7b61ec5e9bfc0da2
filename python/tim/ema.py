"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def ema_weight(
    images_seen: float,
    batch_size: float,
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

    @torch.no_grad()
    def update(self, source: nn.Module, weight: Tensor | float, skip: Tensor | None = None) -> None:
        """ema <- (1 - weight) ema + weight source; buffers are copied.

        `weight` and `skip`, scalars of float32, may be on the device: where `skip` is 1 nothing
        changes. Of modules that are sharded, alike, every rank updates what it holds.
        """
        averages = [_local(average) for average in self.model.parameters()]
        # A step of gradient descent on (ema - source)^2 / 2: the one operation over a list of
        # tensors that takes both numbers from the device.
        torch._fused_sgd_(
            averages,
            [_local(parameter) for parameter in source.parameters()],
            [],
            weight_decay=1.0,
            momentum=0.0,
            lr=torch.as_tensor(weight, dtype=torch.float32, device=averages[0].device),
            dampening=0.0,
            nesterov=False,
            maximize=True,
            is_first_step=False,
            found_inf=skip,
        )
        for average, buffer in zip(self.model.buffers(), source.buffers(), strict=True):
            average.copy_(buffer if skip is None else torch.where(skip == 1, average, buffer))


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
