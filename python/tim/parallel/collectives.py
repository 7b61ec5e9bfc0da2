"""Collectives of FSDP2 with a clock beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

#: As torch 2.13 calls them, and as earlier ones do.
_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

#: Begins a span of time; what it returns ends it.
Timer = Callable[[], Callable[[], None]]


class TimedCollectives:
    """Tells `timer` of each gathering of weights and each sum of gradients of sharded modules.

    They are what FSDP2 does by default, on the stream on which it does them. With
    `sums_between_groups` (hybrid sharding), the sum across the groups is told too.
    """

    def __init__(self, timer: Timer, sums_between_groups: bool):
        self.timer = timer
        self._between = sums_between_groups
        self._end: Callable[[], None] | None = None

    def watch(self, module: nn.Module) -> None:
        """A module that `fully_shard` has been called on."""
        if not hasattr(module, "set_custom_all_gather"):
            return  # torch before 2.8
        module.set_custom_all_gather(_Communication(self._gather))
        module.set_custom_reduce_scatter(_Communication(self._scatter))
        if self._between:
            module.set_all_reduce_hook(self._summed)

    def _gather(self, output: Tensor, values: Tensor, **options: Any) -> dist.Work | None:
        end = self.timer()
        work = _GATHER(output, values, **options)
        end()
        return work

    def _scatter(self, output: Tensor, values: Tensor, **options: Any) -> dist.Work | None:
        end = self.timer()
        work = _SCATTER(output, values, **options)
        end()
        if self._between:
            # The sum across groups follows at once, and the hook after it.
            self._end = self.timer()
        return work

    def _summed(self, gradients: Tensor) -> None:
        if self._end is not None:
            self._end()
            self._end = None


class _Communication:
    """What FSDP2 expects of a collective: where its memory comes from, and the call."""

    def __init__(self, call: Callable[..., dist.Work | None]):
        self._call = call

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, **options: Any
    ) -> dist.Work | None:
        return self._call(output_tensor, input_tensor, **options)
