"""One row of an operation's benchmark: the operation beside its rivals, measured in turns."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from tim.bench.cases import Operation, Size
from tim.bench.machine import caches, name_of, residence, why_no_compile
from tim.bench.memory import peak_bytes
from tim.bench.problem import Problem, relative_error
from tim.bench.report import Candidate, Row
from tim.bench.timing import Calls, Times, compare
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

    A rival that fails (no memory for it, no compiler) is left out with a note, and where there is
    not enough memory for all, those that need most.
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
    peaks: dict[str, int] = {}
    errors: dict[str, float] = {}
    needs: dict[str, int] = {}
    calls_of = {
        name: functools.partial(Problem.call, function=function, compiled=name == "compile")
        for name, function in rivals.items()
    }
    with torch.set_grad_enabled(direction == "backward"):
        for name, call_of in calls_of.items():
            try:
                errors[name] = relative_error(call_of(few)(), exact)
                if not math.isfinite(errors[name]):
                    raise ArithmeticError("a result is missing or not finite")
                kept, peaks[name] = _memory(call_of, first, device)
                needs[name] = kept * sets + peaks[name]
            except Exception as error:
                if name == "tim":
                    raise
                notes.append(f"{name} failed: {type(error).__name__}: {_first_line(error)}")
        copies = {"copy": [_copy(traffic, device) for _ in problems]}
        makers = {
            name: lambda call_of=calls_of[name]: [call_of(problem) for problem in problems]
            for name in rivals
            if name in needs
        }
        times = _compare_what_fits(makers, needs, copies, settings, notes)
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
        candidates={
            name: Candidate(times[name], peaks[name], errors[name])
            for name in rivals
            if name in times
        },
        copy=times["copy"],
        traffic_bytes=traffic,
        flops=operation.flops(size)[direction] if operation.flops else None,
        buffer_sets=sets,
        residence=residence(traffic * sets, device),
        notes=notes,
    )


def _compare_what_fits(
    makers: Mapping[str, Callable[[], Calls]],
    needs: Mapping[str, int],
    copies: Mapping[str, Calls],
    settings: Settings,
    notes: list[str],
) -> dict[str, Times]:
    """Times of all that the memory has room for at a time; of the others a note is left.

    The first is what the row is about, and stays whatever it needs.
    """
    subject = next(iter(makers))
    remaining = sorted(makers, key=lambda name: (name != subject, needs[name]))
    while True:
        functions: dict[str, Calls] = {}
        try:
            for name in remaining:
                functions[name] = makers[name]()
            ordered = {name: functions[name] for name in makers if name in functions}
            return compare({**ordered, **copies}, settings.device, settings.seconds)
        except torch.OutOfMemoryError as error:
            if len(remaining) == 1:
                raise
            notes.append(f"{remaining.pop()} left out, no memory: {_first_line(error)}")
        ordered = functions = {}
        gc.collect()
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()


def _memory(
    call_of: Callable[[Problem], Callable], problem: Problem, device: torch.device
) -> tuple[int, int]:
    """Bytes that the graph of a backward pass keeps, and what a call holds beyond them."""
    before = _allocated(device)
    call = call_of(problem)
    return _allocated(device) - before, peak_bytes(call, device)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


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
