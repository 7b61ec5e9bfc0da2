"""Times of several functions, taken in turns so that all meet the same state of the machine.

A sample is the mean over a fixed number of calls, which lasts long enough for the clock.
Rounds take one sample of every function, starting with another one each time. The figure of a
function is the median of its samples; the least and the quartiles are kept beside it.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from tim.bench.memory import peak_bytes

#: Calls of one function, one for each of its sets of buffers (see `GraphSampler`).
Calls = Sequence[Callable[[], object]]
MIN_ROUNDS = 5
MAX_ROUNDS = 200
#: Shortest sample in seconds.
SAMPLE_SECONDS = {"cpu": 5e-3, "cuda": 2e-3}
#: A call that holds more of a GPU's memory is timed from the host: a graph keeps its memory as long
#: as it lives, and a call that fills that much lasts a thousand times longer than a launch.
LARGEST_GRAPH = 1 / 32


@dataclass(frozen=True)
class Times:
    """Seconds for one call."""

    median: float
    minimum: float
    lower_quartile: float
    upper_quartile: float
    samples: int
    calls_per_sample: int
    method: str  #: "loop": host clock around synchronised calls; "graph": replays of a CUDA graph

    @classmethod
    def of(cls, samples: Sequence[float], calls_per_sample: int, method: str) -> Times:
        lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, min(samples), lower, upper, len(samples), calls_per_sample, method)

    @property
    def spread(self) -> float:
        """Distance between the quartiles as a share of the median."""
        return (self.upper_quartile - self.lower_quartile) / self.median


class LoopSampler:
    """Calls from the host, as a user's program makes them; waits for the device at both ends."""

    method = "loop"

    def __init__(self, calls: Calls, device: torch.device, *, settle: bool = False) -> None:
        """`settle`: call once before each sample, for memory that others have taken meanwhile."""
        self.calls, self.device, self.settle = calls, device, settle
        for call in calls:
            call()

    def sample(self, passes: int) -> float:
        """Seconds for `passes` passes over the calls."""
        if self.settle:
            self.calls[0]()
        self._wait()
        start = time.perf_counter()
        for _ in range(passes):
            for call in self.calls:
                call()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class GraphSampler:
    """Replays of a CUDA graph that holds one call for each set of buffers, timed by events.

    Replays leave out what the host does, so short kernels are measured and not their launches. The
    results of all calls stay allocated during capture: each set then writes its own memory, and
    with enough sets every call finds its operands in device memory instead of the L2 cache.
    """

    method = "graph"

    def __init__(self, calls: Calls) -> None:
        for _ in range(3):
            for call in calls:
                call()
        torch.cuda.synchronize()
        self.calls = calls
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            results = [call() for call in calls]
        del results
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def sample(self, passes: int) -> float:
        start, end = self.events
        start.record()
        for _ in range(passes):
            self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def compare(
    functions: Mapping[str, Calls], device: torch.device, seconds: float, *, graphs: bool = True
) -> dict[str, Times]:
    """Times of all functions, measured in turns for about `seconds` each.

    `graphs` allows CUDA graphs; functions that cannot be captured, or that hold so much memory that
    not all graphs could keep theirs, are called from the host.
    """
    samplers = {name: _sampler(calls, device, graphs) for name, calls in functions.items()}
    passes = {name: _passes(sampler, device) for name, sampler in samplers.items()}
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    names = list(samplers)
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds * len(names)
        for number in range(MAX_ROUNDS):
            if number >= MIN_ROUNDS and time.perf_counter() > end:
                break
            first = number % len(names)
            for name in names[first:] + names[:first]:
                calls = passes[name] * len(functions[name])
                samples[name].append(samplers[name].sample(passes[name]) / calls)
    finally:
        if collecting:
            gc.enable()
    return {
        name: Times.of(samples[name], passes[name] * len(functions[name]), samplers[name].method)
        for name in names
    }


def _sampler(calls: Calls, device: torch.device, graphs: bool) -> LoopSampler | GraphSampler:
    if device.type != "cuda" or not graphs:
        return LoopSampler(calls, device)
    if peak_bytes(calls[0], device) > LARGEST_GRAPH * torch.cuda.mem_get_info(device)[1]:
        return LoopSampler(calls, device, settle=True)
    try:
        return GraphSampler(calls)
    except RuntimeError:
        torch.cuda.synchronize(device)
        return LoopSampler(calls, device)


def _passes(sampler: LoopSampler | GraphSampler, device: torch.device) -> int:
    """Passes that make a sample long enough; also a warm-up."""
    passes, shortest = 1, SAMPLE_SECONDS[device.type]
    while (taken := sampler.sample(passes)) < shortest:
        passes = max(passes + 1, int(passes * min(10.0, 1.2 * shortest / max(taken, 1e-9))))
    return passes
