"""How long the parts of a training step take, and what its values are on average."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable

import torch

from tim.step import COMMUNICATION, PHASES, VALUES, WHOLE

DATA = "data"
#: Under which name the log has the time of each phase of a step.
LOGGED = {DATA: "data_s", WHOLE: "step_s", COMMUNICATION: "communication_s", **dict(zip(PHASES, (
    "forward_derivative_s", "backward_s", "optimizer_s", "optimizer_s", "optimizer_s",
), strict=True))}  # fmt: skip

Time = float | torch.cuda.Event


class Clock:
    """Time between marks, on the device's own clock where it is a GPU: marks wait for nothing.

    `DATA` is making a batch or waiting for it; on a GPU, how long the device is idle meanwhile.
    """

    def __init__(self, device: torch.device, beat: Callable[[str], None] | None = None):
        self._cuda = device.type == "cuda"
        self._beat = beat
        self._marks: list[tuple[str | None, Time]] = []
        self._spans: list[tuple[str, Time, Time]] = []

    def mark(self, phase: str | None) -> None:
        """From now on it is `phase` that takes the time; None for what is no part of a step."""
        if phase is not None and self._beat is not None:
            self._beat(phase)
        self._marks.append((phase, self._now()))

    def begin(self, name: str) -> Callable[[], None]:
        """Begin a span of time on the stream in use, which may lie in other phases or beside them;
        what is returned ends it."""
        start = self._now()
        return lambda: self._spans.append((name, start, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds of each phase and kind of span since the last call; the device must be done with
        them."""
        phases = zip(self._marks, self._marks[1:], strict=False)
        times = [(name, start, end) for (name, start), (_, end) in phases] + self._spans
        seconds: dict[str, float] = defaultdict(float)
        for name, start, end in times:
            if name is not None:
                seconds[name] += start.elapsed_time(end) / 1e3 if self._cuda else end - start
        self._marks.clear()
        self._spans.clear()
        return dict(seconds)

    def _now(self) -> Time:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Meter:
    """Means and speed of the steps since the last record."""

    def __init__(self) -> None:
        self.steps: list[list[float]] = []
        self.seconds = 0.0
        self.phases: dict[str, float] = {}
        self.resume()

    def resume(self) -> None:
        """What happened since the last `add` (sampling, saving) does not count as training time."""
        self._since = time.perf_counter()

    def add(self, steps: list[list[float]], phases: dict[str, float]) -> None:
        """The `VALUES` of some steps, which have just been read from the device, and their time."""
        self.steps += steps
        for name, seconds in phases.items():
            self.phases[LOGGED[name]] = self.phases.get(LOGGED[name], 0.0) + seconds
        self.seconds += time.perf_counter() - self._since
        self.resume()

    def values(self, batch_size: float) -> dict[str, float]:
        """Means over the steps that were not skipped (nan if none), and the speed over all."""
        rate = len(self.steps) / self.seconds
        taken = [v for v in self.steps if all(map(math.isfinite, v))]
        means = {
            name: sum(v[i] for v in taken) / len(taken) if taken else math.nan
            for i, name in enumerate(VALUES)
        }
        times = {name: seconds / len(self.steps) for name, seconds in self.phases.items()}
        return {**means, "steps_per_second": rate, "images_per_second": rate * batch_size, **times}
