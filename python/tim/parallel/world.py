"""The processes of a run: who they are, and what they tell each other beside the training."""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from tim.parallel.devices import pick_device

T = TypeVar("T")
E = TypeVar("E", bound=Exception)


class World:
    """All ranks of a run, seen from one of them; a process alone is a world of size 1.

    `group` and `saving` are groups on the CPU, whatever the training itself runs on: for messages
    of the main thread, and for those of the thread that writes checkpoints.
    """

    def __init__(
        self,
        device: torch.device,
        rank: int = 0,
        size: int = 1,
        local_rank: int = 0,
        local_size: int = 1,
        timeout: float = 600.0,
    ):
        self.device, self.rank, self.size = device, rank, size
        self.local_rank, self.local_size = local_rank, local_size
        self.group = self.saving = None
        if size > 1:
            # Longer than the heartbeat waits, whose message is the better one.
            limit = timedelta(seconds=2 * timeout)
            self.group = dist.new_group(backend="gloo", timeout=limit)
            self.saving = dist.new_group(backend="gloo", timeout=limit)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def exchange(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """The values of all ranks, in their order."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value, group=group or self.group)
        return values

    def from_main(self, call: Callable[[], T]) -> T:
        """What `call` returns on rank 0, or the error it raises there, on every rank."""
        if self.size == 1:
            return call()
        outcome: list = [None, None]
        if self.is_main:
            try:
                outcome[0] = call()
            except Exception as error:
                outcome[1] = _portable(error)
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise known_to_all(outcome[1])
        return outcome[0]

    def together(self, call: Callable[[], T]) -> T:
        """Call on every rank; an error of one is raised on all, that of the lowest rank."""
        result, error = None, None
        try:
            result = call()
        except Exception as found:
            if self.size == 1:
                raise
            error = _portable(found)
        for found in self.exchange(error):
            if found is not None:
                raise known_to_all(found)
        return result  # type: ignore[return-value]

    def largest(self, *values: float) -> list[float]:
        """The largest of each value over all ranks."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()

    def close(self) -> None:
        """Leave together: rank 0 often serves the store that the others still need."""
        if self.size > 1:
            dist.barrier(self.group)


def leave() -> None:
    """End torch.distributed at the end of a process in which nothing uses it any more.

    Left to the end of the interpreter, threads of gloo may abort a process that did all its work.
    """
    if dist.is_initialized():
        # What is held by nothing but cycles, say of DDP's wrapper, holds groups itself.
        gc.collect()
        dist.destroy_process_group()


def known_to_all(error: E) -> E:
    """The error, with a note for whoever tells it that every rank raises it."""
    error.on_all_ranks = True  # type: ignore[attr-defined]
    return error


def _portable(error: Exception) -> Exception:
    """The error, or one of a kind that other processes can be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def launched() -> bool:
    """Whether a launcher such as torchrun has made this process one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(device: str, backend: str = "auto", timeout: float = 600.0) -> World:
    """The world that the launcher's environment describes (RANK, WORLD_SIZE, LOCAL_RANK, ...).

    Starts torch.distributed unless the caller has. `device` is "auto", "cpu", "cuda" or "cuda:N";
    of several processes on a machine with GPUs each takes the GPU of its local rank. `backend` is
    "auto" (nccl on GPUs, gloo else), "nccl" or "gloo".

    Raises ValueError when the device is not there, or does not go with several processes.
    """
    if not launched() and not dist.is_initialized():
        return World(pick_device(device))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.startswith("cuda:"):
        raise known_to_all(
            ValueError(
                f"train.device must be auto, cpu or cuda with several processes, got {device}: "
                "each takes the GPU of its local rank"
            )
        )
    chosen = pick_device(device)
    if chosen.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                "there must be a GPU for each process of this machine, got local rank "
                f"{local_rank} and {torch.cuda.device_count()} GPUs"
            )
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    if backend == "auto":
        backend = "nccl" if chosen.type == "cuda" else "gloo"
    if backend == "nccl" and chosen.type != "cuda":
        raise known_to_all(ValueError("parallel.backend nccl needs train.device cuda, got a CPU"))
    if not dist.is_initialized():
        # Both kinds: DTensors and checkpoints also talk from the CPU.
        kinds = "cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo"
        dist.init_process_group(kinds, timeout=timedelta(seconds=2 * timeout))
    return World(chosen, dist.get_rank(), dist.get_world_size(), local_rank, local_size, timeout)
