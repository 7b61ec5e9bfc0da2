"""SIGTERM, by which schedulers announce the end of a job: all ranks stop after the same step."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

from tim.parallel.world import World

#: Seconds of training between two looks at whether any rank has been told to stop.
INTERVAL = 2.0
#: Most steps between two looks.
MOST_STEPS = 50


class StopRequest:
    """A context in which SIGTERM asks for the end of the run instead of ending the process."""

    def __init__(self, world: World):
        self.world = world
        self.received = False
        self._next = 0
        self._since: tuple[int, float] | None = None
        self._before = None

    def __enter__(self) -> StopRequest:
        # Only there can Python handle signals; a trainer in another thread goes without.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def agreed(self, step: int) -> bool:
        """Whether to stop after step number `step`, the same on all ranks.

        They ask each other about every `INTERVAL` seconds, at steps that all know beforehand.
        """
        if self.world.size == 1 or step < self._next:
            return self.received and self.world.size == 1
        now = time.perf_counter()
        before, then = self._since or (step - 1, now)
        pace = (now - then) / (step - before)
        stop, slowest = self.world.largest(float(self.received), pace)
        self._since = (step, now)
        steps = INTERVAL / slowest if slowest > 0 else 1
        self._next = step + round(min(max(steps, 1), MOST_STEPS))
        return stop > 0
