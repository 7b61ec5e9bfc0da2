"""Processes that train together and take their steps when they are told to.

The worlds of a comparison, of one process or several, live at the same time; all are idle but for
the one whose turn it is.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from tim.bench import machine
from tim.bench.measure import Settings
from tim.bench.memory import peak_bytes
from tim.bench.problem import relative_error
from tim.bench.step import StepCandidate, StepSize, training_candidates
from tim.bench.timing import LoopSampler

#: torch.compile of a large model takes minutes.
PATIENCE = 1200.0
_CONTEXT = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Work:
    """What each process of a world does."""

    size: StepSize
    dtype: torch.dtype
    settings: Settings
    threads: int  #: of each process
    peers: str | None  #: name of a module, which must be importable


@dataclass(frozen=True)
class Prepared:
    """What is known of a candidate before it is timed."""

    peak_bytes: int
    error: float


class Group:
    """A world of `size` processes with all candidates ready; a context that ends them.

    `prepared` has the candidates that run, `notes` why others do not.

    Raises RuntimeError with what a process said when it fails.
    """

    def __init__(self, size: int, work: Work):
        self.size = size
        port = _free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            mine, other = _CONTEXT.Pipe()
            arguments = (rank, size, port, work, other)
            process = _CONTEXT.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            other.close()
            self._pipes.append(mine)
            self._processes.append(process)
        self.prepared: dict[str, Prepared] = {}
        self.notes: list[str] = []

    def prepare(self) -> None:
        """Wait until all candidates have taken their first steps."""
        prepared, notes = zip(*self._answers(), strict=True)
        self.notes = list(dict.fromkeys(note for each in notes for note in each))
        for name in prepared[0]:
            if all(name in each for each in prepared):
                parts = [each[name] for each in prepared]
                peak = max(part.peak_bytes for part in parts)
                self.prepared[name] = Prepared(peak, max(part.error for part in parts))

    def sample(self, name: str, passes: int) -> float:
        """Seconds that the slowest process needs for so many steps."""
        for pipe in self._pipes:
            pipe.send((name, passes))
        return max(self._answers())

    def _answers(self) -> list:
        return [self._answer(rank) for rank in range(self.size)]

    def _answer(self, rank: int) -> object:
        pipe, end = self._pipes[rank], time.monotonic() + PATIENCE
        try:
            while not pipe.poll(1.0):
                if time.monotonic() > end:
                    raise RuntimeError(f"rank {rank} of {self.size} has not answered: it hangs")
            kind, value = pipe.recv()
        except (EOFError, OSError):
            self._processes[rank].join(10)
            code = self._processes[rank].exitcode
            raise RuntimeError(f"rank {rank} of {self.size} ended with {code}") from None
        if kind == "failed":
            raise RuntimeError(f"rank {rank} of {self.size} failed:\n{value}")
        return value

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *exception: object) -> None:
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(None)
        end = time.monotonic() + (0 if exception[0] else 20)
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


def _serve(rank: int, size: int, port: int, work: Work, pipe: Connection) -> None:
    """Main program of a process."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    try:
        from tim.parallel import join, leave

        if work.settings.device.type == "cpu":
            torch.set_num_threads(work.threads)
            machine.keep_freed_memory()
        world = join(work.settings.device.type)
        peers = work.peers and importlib.import_module(work.peers)
        candidates, exact = training_candidates(
            work.size, work.dtype, world, work.settings.compile, peers
        )
        prepared, samplers, notes = {}, {}, []
        for name, candidate in candidates.items():
            try:
                prepared[name], samplers[name] = _prepare(candidate, exact, world.device)
            except Exception as error:
                # An error of one process alone leaves the others waiting; compilers and memory
                # fail alike on all.
                if not samplers:
                    raise
                reason = next(iter(str(error).strip().splitlines()), "no message")
                notes.append(f"{name} failed: {type(error).__name__}: {reason}")
        pipe.send(("prepared", (prepared, notes)))
        for name, passes in iter(pipe.recv, None):
            if size > 1:
                dist.barrier(world.group)
            pipe.send(("seconds", samplers[name].sample(passes)))
        if size > 1:
            world.close()
            leave()
    except (EOFError, KeyboardInterrupt):
        return
    except BaseException:
        with suppress(OSError):
            pipe.send(("failed", traceback.format_exc()))
        raise SystemExit(1) from None


def _prepare(
    candidate: StepCandidate, exact: torch.Tensor, device: torch.device
) -> tuple[Prepared, LoopSampler]:
    with candidate.context():
        _, derivative = candidate.objective()
    error = relative_error([derivative.detach()], [exact])
    sampler = LoopSampler([candidate.step()], device)  # takes the first step
    candidate.forget()
    return Prepared(peak_bytes(candidate.step(), device), error), sampler


def sizes_that_fit(device: torch.device, wanted: Sequence[int]) -> list[int]:
    """Numbers of ranks for which there are devices."""
    most = torch.cuda.device_count() if device.type == "cuda" else max(wanted)
    return [size for size in wanted if size <= most]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
