"""One row of an operation's benchmark: the operation beside its rivals, measured in turns."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from tim.bench.cases import Operation, Size
from tim.bench.machine import caches, name_of, residence, why_no_compile
from tim.bench.memory import peak_bytes
from tim.bench.problem import Problem, relative_error
from tim.bench.report import Candidate, Row
from tim.bench.timing import Calls, compare
from tim.ops import _dispatch as dispatch

#: The sets of buffers that a GPU benchmark goes round exceed its L2 cache this many times.
L2_MULTIPLE = 3
MAX_SETS = 64


#: Others' implementations by name, called as ours is: of an operation, a direction, a device.
Rivals = Callable[[str, str, torch.device], dict[str, Callable]]


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    device: torch.device
    seconds: float = 0.4  #: for each of the functions that a row compares
    compile: bool = False  #: with torch.compile of the references


def measure(
    operation: Operation,
    size: Size,
    dtype: torch.dtype,
    direction: str,
    settings: Settings,
    rivals_of: Rivals | None = None,
) -> Row:
    """The operation, its reference, torch.compile of that, rivals, and a copy of as many bytes.

    A rival that fails (no memory for it, no compiler) is left out with a note.
    """
    device = settings.device
    first = Problem.random(operation, size, dtype, direction, device)
    traffic = first.traffic_bytes()
    sets = _buffer_sets(traffic, device)
    problems = [
        first,
        *(Problem.random(operation, size, dtype, direction, device, i) for i in range(1, sets)),
    ]
    few = first
    if size.probe != size:
        few = Problem.random(operation, size.probe, dtype, direction, device)
    exact = few.exact()
    notes = []
    rivals = {"tim": operation.op, "reference": operation.reference}
    if settings.compile:
        if (reason := why_no_compile(device)) is None:
            torch._dynamo.reset()
            rivals["compile"] = first.compile_reference()
        else:
            notes.append(reason)

    if rivals_of is not None:
        rivals |= rivals_of(operation.name, direction, device)
    functions: dict[str, Calls] = {}
    peaks: dict[str, int] = {}
    errors: dict[str, float] = {}
    with torch.set_grad_enabled(direction == "backward"):
        for name, function in rivals.items():
            compiled = name == "compile"
            try:
                calls = [problem.call(function, compiled=compiled) for problem in problems]
                errors[name] = relative_error(few.call(function, compiled=compiled)(), exact)
                if not math.isfinite(errors[name]):
                    raise ArithmeticError("a result is missing or not finite")
                peaks[name], functions[name] = peak_bytes(calls[0], device), calls
            except Exception as error:
                if name == "tim":
                    raise
                notes.append(f"{name} failed: {type(error).__name__}: {_first_line(error)}")
        copies = {"copy": [_copy(traffic, device) for _ in problems]}
        try:
            times = compare({**functions, **copies}, device, settings.seconds)
        except torch.OutOfMemoryError as error:
            # Several at a time need more than one alone; the row is about tim.
            notes.append(f"no memory to time the rivals: {_first_line(error)}")
            functions = {"tim": functions["tim"]}
            times = compare({**functions, **copies}, device, settings.seconds)
    gc.collect()
    reason = dispatch.why_not(operation.kernel, first.inputs[0], direction=direction)
    return Row(
        benchmark=operation.name,
        size=size.name,
        shape=asdict(size),
        dtype=name_of(dtype),
        direction=direction,
        device=device.type,
        runs_on=f"{device.type} kernel" if reason is None else f"PyTorch: {reason}",
        candidates={name: Candidate(times[name], peaks[name], errors[name]) for name in functions},
        copy=times["copy"],
        traffic_bytes=traffic,
        flops=operation.flops(size)[direction] if operation.flops else None,
        buffer_sets=sets,
        residence=residence(traffic * sets, device),
        notes=notes,
    )


def _buffer_sets(traffic: int, device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return min(MAX_SETS, math.ceil(L2_MULTIPLE * caches(device)["L2"] / traffic))


def _copy(traffic: int, device: torch.device) -> Callable[[], Tensor]:
    """A copy that reads and writes `traffic` bytes together."""
    source = torch.randint(0, 256, (max(1, traffic // 2),), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")
