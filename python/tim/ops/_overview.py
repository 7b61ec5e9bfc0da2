"""The table of what runs where, in words, for `tim info --ops`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from tim.ops import _table
from tim.ops._dispatch import OPERATORS, Operator
from tim.ops._table import DEVICES, DIRECTIONS, KERNEL_DTYPES, Rule, dtype_name


@dataclass(frozen=True)
class Entry:
    """One operation on one device, in the directions for which the table says the same."""

    operation: str
    device: str
    directions: tuple[str, ...]
    kernel: tuple[str, ...]  #: dtypes that run on a kernel; sizes that do not are in `otherwise`
    otherwise: str  #: what PyTorch runs, and why


def overview() -> list[Entry]:
    """The table as it is in force, `TIM_KERNELS` included."""
    entries: list[Entry] = []
    for name in _table.KERNEL_OPS:
        for device in DEVICES:
            groups: dict[tuple[tuple[str, ...], str], list[str]] = {}
            for direction in DIRECTIONS:
                groups.setdefault(_say(name, direction, device), []).append(direction)
            for (dtypes, otherwise), directions in groups.items():
                entries.append(Entry(name, device, tuple(directions), dtypes, otherwise))
    return entries


def _say(name: str, direction: str, device: str) -> tuple[tuple[str, ...], str]:
    operator = OPERATORS.get(name)
    if operator is not None and direction == "tangent" and operator.pair is None:
        return (), "it has no forward-mode rule and raises"
    if operator is not None and direction == "backward" and 0 in operator.constant:
        return (), "everything: its kernel has no gradient"
    choices = {d: _table.choose(name, direction, device, d) for d in KERNEL_DTYPES[device]}
    dtypes = [dtype for dtype, choice in choices.items() if choice.reason is None]
    reasons = {c.reason: None for c in choices.values() if c.reason is not None}
    if not dtypes:
        return (), f"everything: {'; '.join(reasons)}"
    rules = dict.fromkeys(rule for dtype in dtypes for rule in choices[dtype].rules)
    said = [*map(_exception, rules), *_without_kernel(operator, direction)]
    return tuple(map(dtype_name, dtypes)), "; ".join([*said, *reasons, "other dtypes"])


def _without_kernel(operator: Operator | None, direction: str) -> list[str]:
    """Gradients and tangents of inputs for which the kernels have none."""
    if operator is None:
        return []
    parameters = inspect.signature(operator.reference).parameters.values()
    names, said = [p.name for p in parameters if p.annotation == "Tensor"], []
    if operator.constant and direction != "forward":
        said.append(f"gradients of {', '.join(names[i] for i in operator.constant)}")
    if direction == "tangent" and names[operator.moving :]:
        said.append(f"tangents of {', '.join(names[operator.moving :])}")
    return said


def _exception(rule: Rule) -> str:
    conditions = [
        f"{what} {_range(*bounds)}"
        for what, bounds in (("elements", rule.elements), ("last dimension", rule.width))
        if bounds != (0, None)
    ]
    if rule.widths:
        conditions.append(f"last dimension not {', '.join(map(str, rule.widths))}")
    if rule.dtypes:
        conditions.append(", ".join(map(dtype_name, rule.dtypes)))
    return f"{' and '.join(conditions)} ({rule.reason})"


def _range(low: int, high: int | None) -> str:
    if high is None:
        return f"from {low}"
    return f"up to {high}" if low == 0 else f"{low} to {high}"
