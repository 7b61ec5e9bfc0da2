"""How many kernels a training step launches, counted without a GPU.

What PyTorch dispatches is counted below autograd, forward and backward pass alike: each operation
that computes or copies is one launch, views and allocations are none. Operations over lists of
tensors are cut into as many launches as PyTorch's GPU kernels cut them, and kernels of this package
count as often as their GPU sources launch. A few operations of PyTorch are more than one kernel on
a GPU (the backward passes of attention, layer norm and embedding): they count as one for everybody.
"""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tim.ops import _dispatch, _table
from tim.step import PHASES

#: GPU kernels behind one call of the extension, where there are always several (csrc/cuda).
KERNELS = {"adaln_backward": 2, "qk_norm_rope_backward": 3}
#: Operations that compute nothing: allocation, questions about tensors, views that do not say so.
_SILENT = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "is_same_size",
    "_has_same_storage_numel", "promote_types", "_efficientzerotensor", "scalar_tensor",
    "_unsafe_view", "_reshape_alias",
}  # fmt: skip
#: PyTorch's multi_tensor_apply: tensors and blocks of one launch, elements of one block.
_LIST_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_LIST_BLOCKS = 320
_BLOCK_ELEMENTS = 65536


class LaunchCounter(TorchDispatchMode):
    """Counts the launches of what runs inside, by phase and operation.

    A phase begins where one of `PHASES` is entered with torch.profiler.record_function.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Counter[str]] = {phase: Counter() for phase in PHASES}
        self._phase = PHASES[0]

    @property
    def totals(self) -> dict[str, int]:
        return {phase: sum(counter.values()) for phase, counter in self.counts.items()}

    def add(self, name: str, launches: int = 1) -> None:
        if launches:
            self.counts[self._phase][name] += launches

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        name, keywords = operation.overloadpacket.__name__, keywords or {}
        if operation.namespace == "profiler":
            if name.startswith("_record_function_enter") and arguments[0] in PHASES:
                self._phase = arguments[0]
            return operation(*arguments, **keywords)
        if operation.namespace == "tim":
            # What it does in PyTorch is counted as everywhere, its kernels when it calls them.
            with self:
                return operation._op_dk(torch._C.DispatchKey.CPU, *arguments, **keywords)
        result = operation(*arguments, **keywords)
        self.add(name, _launches(operation, arguments, result))
        return result


@contextmanager
def counting() -> Iterator[LaunchCounter]:
    """A counter for what runs inside, which takes the forms that a GPU takes."""
    counter = LaunchCounter()
    launch = _dispatch.launch

    def counted(name: str, *arguments: object) -> None:
        counter.add(f"tim::{name}", kernels(name, *arguments))
        launch(name, *arguments)

    # The names of these modules in tim.ops are those of their functions.
    attention = importlib.import_module("tim.ops._attention_tiled")
    grouped = importlib.import_module("tim.ops.grouped_linear")
    tiles = {**attention.TILE_ELEMENTS, "cpu": attention.TILE_ELEMENTS["cuda"]}
    with (
        mock.patch.object(_dispatch, "launch", counted),
        mock.patch.object(grouped, "gathers", lambda device: True),
        mock.patch.object(attention, "TILE_ELEMENTS", tiles),
        # On a GPU attention is PyTorch's, with its tangent in tiles, until it has kernels there.
        _table.kernels(f"{_table.in_force()},attention:off"),
        counter,
    ):
        yield counter


def kernels(name: str, anchor: Tensor, *_: object) -> int:
    """GPU kernels behind a call; `anchor` is the tensor that tells the device."""
    if name == "transition_loss":
        parts = importlib.import_module("tim.ops.transition_loss").parts
        return 1 + (parts(len(anchor), anchor.shape[2:].numel()) > 1)
    return KERNELS.get(name, 1)


def count_launches(step: Callable[[], object], device: torch.device) -> dict[str, Counter[str]]:
    """Launches of one call of `step`, which has been called before, by phase and operation.

    On a GPU the kernels, copies and fills that the profiler records, all in one phase.
    """
    if device.type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            step()
            torch.cuda.synchronize(device)
        kernels = (e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA)
        return {"all": Counter(event.name for event in kernels)}
    with counting() as counter:
        step()
    return counter.counts


def _launches(operation, arguments: Sequence, result: object) -> int:
    name = operation.overloadpacket.__name__
    if name in _SILENT or operation.is_view or _returns_view(operation):
        return 0
    lists = [value for value in arguments if isinstance(value, (list, tuple)) and _tensors(value)]
    if lists and name.startswith(("_foreach", "_fused")):
        depth = len([values for values in lists if len(values) == len(lists[0])])
        depth += not name.endswith("_")
        # A norm adds up the blocks of each tensor in a kernel of its own.
        return list_launches(lists[0], depth) + (name == "_foreach_norm")
    outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    return int(not outputs or any(output.numel() for output in outputs))


def list_launches(tensors: Sequence[Tensor], depth: int) -> int:
    """Launches of an operation over so many lists of tensors, cut as PyTorch cuts them."""
    most = _LIST_TENSORS[min(depth, 5)]
    launches = held = blocks = 0
    for tensor in tensors:
        if not tensor.numel():
            continue
        held += 1
        for left in reversed(range(math.ceil(tensor.numel() / _BLOCK_ELEMENTS))):
            blocks += 1
            if blocks == _LIST_BLOCKS or (held == most and not left):
                launches, blocks = launches + 1, 0
                held = int(left > 0)
    return launches + (blocks > 0)


def _returns_view(operation) -> bool:
    return any(
        returned.alias_info is not None and not returned.alias_info.is_write
        for returned in operation._schema.returns
    )


def _tensors(values: Sequence) -> bool:
    return len(values) > 0 and all(isinstance(value, Tensor) for value in values)
