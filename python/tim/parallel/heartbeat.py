"""Which rank hangs: every rank says how far it is, and all know who is behind when all stop.

A rank that hangs stops all others too, in their next collective, and there they wait without an
error until the backend's own limit, whose message names the wrong ones. So each rank counts its
steps' phases, a thread of it puts the count into the store of torch.distributed, and when a rank
has not moved for `timeout` seconds its thread looks who is furthest behind, says so and ends the
process: a main thread that sits in a collective cannot be told.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch.distributed as dist

from tim.parallel.world import World

#: Exit code of a rank whose run has stopped because some rank hangs.
HANGS = 70


class Beat(NamedTuple):
    """Where a rank is: beats so far, the step, and what it does there."""

    count: int
    step: int
    phase: str
    host: str
    process: int

    def __str__(self) -> str:
        return f"{self.phase} of step {self.step}"


class Heartbeat:
    """A context around the steps of a run; `beat` is called by all ranks at the same points."""

    def __init__(
        self, world: World, timeout: float, stop: Callable[[str, float], None] | None = None
    ):
        self.world, self.timeout = world, timeout
        self._stop = stop or _say_and_exit
        self._beat = Beat(0, 0, "start", socket.gethostname(), os.getpid())
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, step: int, phase: str) -> None:
        """This rank begins `phase` of step number `step`; costs nothing."""
        self._beat = self._beat._replace(count=self._beat.count + 1, step=step, phase=phase)

    def __enter__(self) -> Heartbeat:
        if self.world.size > 1:
            # A connection of its own: the main thread may wait in the other one.
            self._store = dist.PrefixStore("tim-heartbeat", _connect())
            self._thread = threading.Thread(target=self._run, name="tim-heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        told, since = None, time.monotonic()
        pause = min(5.0, self.timeout / 10)
        while not self._ended.wait(pause):
            beat = self._beat
            try:
                if beat != told:
                    told, since = beat, time.monotonic()
                    self._store.set(str(self.world.rank), json.dumps(beat))
                elif time.monotonic() - since > self.timeout:
                    beats = [
                        Beat(*json.loads(self._store.get(str(rank))))
                        for rank in range(self.world.size)
                    ]
                    self._stop(describe(beats, self.world.rank, self.timeout), 3 * pause)
                    return
            except RuntimeError:
                # The store is gone, and so is the rank that kept it: the collectives will tell.
                return


def describe(beats: list[Beat], rank: int, timeout: float) -> str:
    """Who is behind, as rank number `rank` tells it."""
    last = min(beat.count for beat in beats)
    behind = [number for number, beat in enumerate(beats) if beat.count == last]
    head = f"rank {rank}: no progress for {timeout:g} s"
    if len(behind) == len(beats):
        return (
            f"{head}; all ranks are in {beats[rank]}, so it is the device or the network that hangs"
        )
    names = ", ".join(
        f"rank {number} (process {beats[number].process} on {beats[number].host}) hangs in "
        f"{beats[number]}"
        for number in behind
    )
    return f"{head}; {names}, while rank {rank} is in {beats[rank]} and waits"


def _connect() -> dist.Store:
    """A new connection to the store of torch.distributed."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False)


def _say_and_exit(text: str, delay: float) -> None:
    print(f"tim train: {text}", file=sys.stderr, flush=True)
    # The end of this process breaks the connections of others, which are about to say the same.
    time.sleep(delay)
    os._exit(HANGS)
