"""Which operation runs where: one table, and the environment variable that overrides it.

Kernels run wherever the extension holds one, except for what stands in LIMITS (a kernel cannot) and
in SLOWER (a kernel can, but was measured to lose). `tim info --ops` prints the result.

TIM_KERNELS is a list with commas between its entries, each OPERATION:WHERE, or WHERE alone for all
operations; a later entry overrides an earlier one. WHERE is one of

    auto       this table (the default)
    on         kernels wherever they can run, SLOWER left aside
    off        PyTorch
    cpu, cuda  `on` for tensors of this device, `off` for those of the other one
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from tim import _extension

DEVICES = ("cpu", "cuda")
DIRECTIONS = ("forward", "backward", "tangent")
#: Operations with kernels, in the order in which a transformer block and the objective meet them.
KERNEL_OPS = (
    "interpolate", "adaln", "qk_norm_rope", "attention", "swiglu", "transition_loss",
)  # fmt: skip
KERNEL_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
#: What the choices for a device rest on; None where nothing has been measured.
MEASURED: dict[str, str | None] = {
    "cpu": "benchmarks/results/cpu-amd-epyc-2026-11-25.json (two threads, AVX-512)",
    "cuda": None,
}
WHERE = ("auto", "on", "off", *DEVICES)
_GRAMMAR = (
    "TIM_KERNELS must be WHERE or OPERATION:WHERE, several with commas between them, with WHERE "
    f"one of {', '.join(WHERE)} and OPERATION one of {', '.join(KERNEL_OPS)}"
)


@dataclass(frozen=True)
class Rule:
    """Calls of an operation that run the reference although the extension has a kernel.

    The direction of a call is "tangent" when an input carries a tangent, else "backward" when
    autograd records it (its forward pass decides for both), else "forward".
    """

    operation: str
    device: str
    reason: str
    directions: tuple[str, ...] = DIRECTIONS
    dtypes: tuple[torch.dtype, ...] = ()  #: all of the kernels where empty
    elements: tuple[int, int | None] = (0, None)  #: of the first tensor, from and up to
    width: tuple[int, int | None] = (0, None)  #: of its last dimension, from and up to
    widths: tuple[int, ...] = ()  #: of its last dimension to which the rule does not apply

    @property
    def always(self) -> bool:
        """Whether it holds for all sizes."""
        return not self.widths and self.elements == self.width == (0, None)

    def covers(self, direction: str, dtype: torch.dtype) -> bool:
        return direction in self.directions and (not self.dtypes or dtype in self.dtypes)

    def holds(self, elements: int, width: int) -> bool:
        if width in self.widths:
            return False
        return _within(elements, self.elements) and _within(width, self.width)


def _within(value: int, bounds: tuple[int, int | None]) -> bool:
    low, high = bounds
    return value >= low and (high is None or value <= high)


#: Calls that a kernel cannot take.
LIMITS: tuple[Rule, ...] = (
    Rule("adaln", "cuda", "the kernel takes rows of up to 8192", width=(8193, None)),
    Rule(
        "attention",
        "cuda",
        "the kernel is compiled for head dimensions of 64, 72, 96 and 128",
        widths=(64, 72, 96, 128),
    ),
    Rule("attention", "cuda", "the kernel takes bfloat16 and float16", dtypes=(torch.float32,)),
    Rule("qk_norm_rope", "cuda", "the kernel takes rows of up to 256", width=(257, None)),
)
#: Calls that a kernel was measured to be slower for. At the sizes of models every CPU row in the
#: file of MEASURED is faster than PyTorch, eager and compiled. On a few hundred elements all is
#: overhead: forward and tangent win there too, but recording a gradient costs 9 to 17 us more than
#: PyTorch's own, in swiglu, adaln and attention. They are no rules here, because activation
#: checkpointing recomputes without tangents and has to find the tensors that were saved with them,
#: so the choice must not depend on the direction. On a GPU nothing has been measured yet.
SLOWER: tuple[Rule, ...] = ()


def has_kernel(name: str, device_type: str) -> bool:
    return hasattr(_extension.kernels(device_type), name)


def backends(name: str) -> tuple[str, ...]:
    """Device types for which the extension holds kernels of operation `name`."""
    return tuple(device for device in DEVICES if has_kernel(name, device))


@dataclass(frozen=True)
class Choice:
    """What the table says for one operation, direction, device and dtype."""

    reason: str | None  #: why no kernel runs, whatever the size; None: `rules` decide
    rules: tuple[Rule, ...] = ()

    def why_not(self, first: torch.Tensor) -> str | None:
        """Reason why no kernel runs for a first tensor of this size; None: the kernel does."""
        if self.reason is not None or not self.rules:
            return self.reason
        width = first.shape[-1] if first.dim() else 1
        for rule in self.rules:
            if rule.holds(first.numel(), width):
                return f"{rule.reason}, got {list(first.shape)}"
        return None


def parse(text: str) -> dict[str, str]:
    """Where each operation with kernels runs, by a value of TIM_KERNELS. Raises ValueError."""
    places = dict.fromkeys(KERNEL_OPS, "auto")
    for entry in text.split(","):
        if not entry.strip():  # as where a variable is set to nothing
            continue
        name, colon, where = entry.strip().lower().rpartition(":")
        if where not in WHERE or (colon and name not in KERNEL_OPS):
            raise ValueError(f"{_GRAMMAR}, got {entry.strip()!r}")
        places.update(dict.fromkeys([name] if colon else KERNEL_OPS, where))
    return places


_text = os.environ.get("TIM_KERNELS") or "auto"
_places = parse(_text)


@contextmanager
def kernels(text: str) -> Iterator[None]:
    """Choose kernels inside this context as the value `text` of TIM_KERNELS does."""
    global _text, _places
    before = _text, _places
    _text, _places = text, parse(text)
    recall.cache_clear()
    try:
        yield
    finally:
        _text, _places = before
        recall.cache_clear()


def in_force() -> str:
    """The value of TIM_KERNELS, or of the innermost `kernels`, that holds now."""
    return _text


def all_off() -> bool:
    """Whether every operation runs its reference, in `reference_only` or by TIM_KERNELS=off."""
    return all(where == "off" for where in _places.values())


def reference_only() -> AbstractContextManager[None]:
    """Run every operation's PyTorch reference inside this context, as `TIM_KERNELS=off` does."""
    return kernels("off")


def choose(name: str, direction: str, device_type: str, dtype: torch.dtype) -> Choice:
    """The table's answer, overrides included."""
    where = _places.get(name, "auto")
    if where == "off" or (where in DEVICES and where != device_type):
        return Choice(f"TIM_KERNELS={_text} is in force")
    if not has_kernel(name, device_type):
        return Choice(_extension.REASON or f"the extension has no {device_type} kernel for {name}")
    if dtype not in KERNEL_DTYPES[device_type]:
        known = ", ".join(map(dtype_name, KERNEL_DTYPES[device_type]))
        return Choice(f"{device_type} kernels take {known}, got {dtype_name(dtype)}")
    rules = LIMITS if where != "auto" else LIMITS + SLOWER
    mine = [rule for rule in rules if (rule.operation, rule.device) == (name, device_type)]
    mine = [rule for rule in mine if rule.covers(direction, dtype)]
    for rule in mine:
        if rule.always:
            return Choice(f"{rule.reason}, got {dtype_name(dtype)}")
    return Choice(None, tuple(mine))


#: `choose` for calls outside of graphs being compiled: dynamo does not look into caches.
recall = functools.cache(choose)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
