"""`tim train --profile`: a trace of a few steps on every rank, a table of where their time went.

Imported only by a run that asks for it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler import record_function
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

from tim.meter import DATA
from tim.parallel import World
from tim.run_log import NoLog, RunLog
from tim.step import PHASES

T = TypeVar("T")
#: Steps that run as they are, that run under the profiler without being kept, and that are kept.
WAIT, WARM_UP, ACTIVE = 2, 2, 3
STEPS = WAIT + WARM_UP + ACTIVE

#: Rows of the table beside the phases.
COMMUNICATION = "communication"
EXPOSED = "communication alone"
#: How the names of collectives begin, on a CPU and among a GPU's kernels.
_COLLECTIVES = ("gloo:", "nccl")

Span = tuple[float, float]


class StepProfile:
    """A context around the steps of a run; `step` is told when one is done.

    The trace of each rank is at `run`/profile/rankR.json.gz, for chrome://tracing or Perfetto; the
    table of rank 0 is in the log.

    Raises ValueError when fewer than `STEPS` steps are left.
    """

    def __init__(self, run: Path, world: World, log: RunLog | NoLog, first: int, steps: int):
        if steps - first < STEPS:
            raise ValueError(
                f"--profile records the last {ACTIVE} of {STEPS} steps: train.steps must be at "
                f"least {first + STEPS}, got {steps}"
            )
        self.path = run / "profile" / f"rank{world.rank}.json.gz"
        self._log, self._first, self._written = log, first, False
        activities = [ProfilerActivity.CPU]
        if world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports its starts and stops
        self._profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=WAIT, warmup=WARM_UP, active=ACTIVE, repeat=1),
            on_trace_ready=self._write,
            acc_events=True,
        )

    def __enter__(self) -> StepProfile:
        self._profiler.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._profiler.stop()
        if not self._written:
            self._log.note("no profile: the run ended before there were steps to record")

    def batches(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; waiting for one is recorded."""
        iterator = iter(batches)
        while True:
            with record_function(DATA):
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch

    def step(self) -> None:
        self._profiler.step()

    def _write(self, profiler: torch.profiler.profile) -> None:
        self.path.parent.mkdir(exist_ok=True)
        temporary = self.path.with_name(f"{self.path.name}.tmp-{os.getpid()}.gz")
        profiler.export_chrome_trace(str(temporary))
        os.replace(temporary, self.path)
        self._written = True
        seconds = breakdown(profiler.events())
        step = self._first + STEPS
        self._log.event(step, event="profile", trace=str(self.path), steps=ACTIVE, seconds=seconds)
        width = max(map(len, seconds))
        rows = [f"  {name:{width}}  {1e3 * value:9.3f} ms" for name, value in seconds.items()]
        title = f"profile of {ACTIVE} steps, host time of a step on rank 0 (trace: {self.path})"
        self._log.note("\n".join([title, *rows]))


def breakdown(events: Iterable[FunctionEvent], steps: int = ACTIVE) -> dict[str, float]:
    """Seconds of a step in each phase on the host; of several ranks also in communication.

    Communication runs beside the phases: that part of it during which nothing is computed, neither
    on a GPU nor on the host of a run without one, is counted again as `EXPOSED`.
    """
    phases = dict.fromkeys((DATA, *PHASES), 0.0)
    spans: dict[DeviceType, dict[bool, list[Span]]] = defaultdict(lambda: {True: [], False: []})
    for event in events:
        span = (event.time_range.start, event.time_range.end)
        if event.name in phases:
            if event.device_type == DeviceType.CPU:
                phases[event.name] += (span[1] - span[0]) / 1e6 / steps
        elif event.name.startswith(_COLLECTIVES):
            # On the host of a GPU its collectives are only started.
            spans[event.device_type][True].append(span)
        elif event.device_type != DeviceType.CPU or event.name.startswith(("aten::", "tim::")):
            spans[event.device_type][False].append(span)
    kind = DeviceType.CUDA if DeviceType.CUDA in spans else DeviceType.CPU
    if collectives := merged(spans[kind][True]):
        alone = length(collectives) - length(common(collectives, merged(spans[kind][False])))
        phases[COMMUNICATION] = length(collectives) / 1e6 / steps
        phases[EXPOSED] = alone / 1e6 / steps
    return phases


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same times as spans that do not overlap, in order."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def common(a: list[Span], b: list[Span]) -> list[Span]:
    """What two lists of `merged` spans have in common."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in spans)
