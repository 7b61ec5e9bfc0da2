"""Real processes for a test: the ranks of one run, on gloo, each with a log of its own.

They are forked from a server that has imported what they need, once for all tests of a process.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tim.parallel import leave

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["tim.trainer", "tim.checkpoint.sharded", "torch.distributed.fsdp", "torch.distributed.tensor",
     "torch._dynamo", "sklearn.datasets"]
)  # fmt: skip


class Ranks:
    """`size` processes that call `function(*arguments)` as ranks of one world.

    A context; whoever still runs at its end is killed.
    """

    def __init__(self, size: int, folder: Path, function: Callable, *arguments: Any):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.processes = [
            _CONTEXT.Process(
                target=_enter, args=(rank, size, port, folder, function, arguments), daemon=False
            )
            for rank in range(size)
        ]

    def __enter__(self) -> Ranks:
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def send(self, rank: int, signal: int) -> None:
        os.kill(self.processes[rank].pid, signal)

    def exit_codes(self, seconds: float = 300) -> list[int | None]:
        """Wait for the end of all ranks.

        So long, because it tells little about them how busy the machine is. Whether they hang is
        for `parallel.timeout` to say, of the steps.
        """
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def results(self) -> list[Any]:
        """What the function returned on each rank; fails with a rank's traceback."""
        codes = self.exit_codes()
        if None in codes:
            self._tell_where_they_are()
        for rank, code in enumerate(codes):
            told = f"ended with {code}" if code is not None else "has not ended"
            assert code == 0, f"rank {rank} {told}:\n{self.output(rank)}"
        paths = [self.folder / f"{rank}.pt" for rank in range(len(self.processes))]
        return [torch.load(path, weights_only=False) for path in paths]

    def _tell_where_they_are(self) -> None:
        """Let every rank that still runs write the stacks of its threads to its output."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(1)

    def output(self, rank: int) -> str:
        """What the rank wrote to stdout and stderr so far."""
        return (self.folder / f"{rank}.txt").read_text()


def run_ranks(size: int, folder: Path, function: Callable, *arguments: Any) -> list[Any]:
    """Results of a function on all ranks."""
    with Ranks(size, folder, function, *arguments) as ranks:
        return ranks.results()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def records(run: Path) -> list[dict]:
    """The log of a run, without a line that is being written."""
    path = run / "log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def _enter(
    rank: int, size: int, port: int, folder: Path, function: Callable, arguments: tuple
) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    log = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)
    try:
        torch.save(function(*arguments), folder / f"{rank}.pt")
        leave()
    except BaseException:
        traceback.print_exc()
        raise
