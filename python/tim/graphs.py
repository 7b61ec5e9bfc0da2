"""CUDA graphs: a function recorded once and replayed, launched as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Tree = TypeVar("Tree")

#: Calls that run the function as it is, before one records it: libraries choose their algorithms
#: and lazily created state comes to be.
WARM_UP = 3


class Replayed:
    """A function of no arguments that works on tensors which stay where they are.

    It must not wait for the device, nor draw random numbers. Its result, a tensor, is a copy: the
    one in the graph is written over by the next call.

    Raises:
        ValueError: `device` is no CUDA device; `what` names the switch that asked for a graph.
        RuntimeError: the function cannot be recorded.
    """

    def __init__(self, function: Callable[[], Tensor], device: torch.device, what: str):
        check_device(device, what)
        self.function, self.device, self.what = function, device, what
        self.calls = 0
        self._side: torch.cuda.Stream | None = None
        self._replay: Callable[[], Tensor] | None = None

    def __call__(self) -> Tensor:
        if self.calls < WARM_UP:
            self.calls += 1
            return self._warm_up()
        if self._replay is None:
            try:
                self._replay = self._record()
            except RuntimeError as error:
                reason = " ".join(str(error).split())
                raise RuntimeError(f"{self.what}: no CUDA graph of this: {reason}") from error
        return self._replay().clone()

    def _warm_up(self) -> Tensor:
        """A call on a side stream, as recording will be; on one, so that memory is used again."""
        if self._side is None:
            self._side = torch.cuda.Stream(self.device)
        current = torch.cuda.current_stream(self.device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            result = self.function()
        current.wait_stream(self._side)
        result.record_stream(current)
        return result

    def _record(self) -> Callable[[], Tensor]:
        """Records without running; every later call is a replay."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph):
            result = self.function()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def check_device(device: torch.device, what: str) -> None:
    """ValueError unless `device` is a CUDA device."""
    if device.type != "cuda":
        raise ValueError(f"{what} needs a CUDA device, got {device}")


def copied_into(buffers: Tree | None, values: Tree) -> Tree:
    """`buffers` with the tensors of `values` copied into its own; copies of them at first.

    Both are trees of tensors and None, of the same shapes.
    """
    if buffers is None:
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, values)
    pairs = list(zip(tree_leaves(buffers), tree_leaves(values), strict=True))
    pairs = [(buffer, value) for buffer, value in pairs if isinstance(buffer, Tensor)]
    for buffer, value in pairs:  # all of them before any is written
        if buffer.shape != value.shape:
            raise ValueError(
                f"inputs of a CUDA graph must keep their shapes: {list(buffer.shape)} became "
                f"{list(value.shape)}"
            )
    for buffer, value in pairs:
        buffer.copy_(value)
    return buffers
