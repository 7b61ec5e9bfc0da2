"""Batches read ahead of the steps that use them: in a thread, or by worker processes."""

from __future__ import annotations

import logging
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from tim.data.bucket_order import BucketOrder
from tim.data.dataset import Batch, Dataset
from tim.data.files import FileDataset
from tim.data.order import BatchOrder
from tim.data.token_order import TokenOrder

#: Deaths of worker processes without a batch in between after which a run ends.
MAX_DEATHS = 5
#: Deaths at one image after which it counts as unreadable.
MAX_DEATHS_AT_ONE = 2

#: Which images of a batch are wanted (None: all), or that as a function of how many it has.
Rows: TypeAlias = np.ndarray | Callable[[int], np.ndarray | None] | None


class DataWorkerDied(RuntimeError):
    """Worker processes die whatever they are given."""


@dataclass(frozen=True)
class Maker:
    """Makes the batch of a step, or some rows of it; augmentation is drawn from (seed, step)."""

    dataset: Dataset
    order: BatchOrder | BucketOrder | TokenOrder
    rows: Rows = None

    def __call__(self, step: int) -> Batch:
        # The third number keeps this stream apart from the permutations' (seed, epoch).
        rng = np.random.default_rng([self.order.seed, step, 1])
        indices = self.order.indices(step)
        rows = self.rows(len(indices)) if callable(self.rows) else self.rows
        return self.dataset.batch(indices, rng, *(() if rows is None else (rows,)))


def batches(
    dataset: Dataset,
    order: BatchOrder | BucketOrder | TokenOrder,
    start: int,
    stop: int,
    rows: Rows = None,
    processes: int = 0,
) -> Iterator[Batch]:
    """The batches of steps start .. stop - 1, or `rows` of each.

    Data sets with `prefetch` > 0 are read that many batches ahead in a thread; a FileDataset by
    `processes` if there are to be any, each of which makes whole batches. One that dies is
    replaced, and the steps that it had not finished are read again: since a batch depends on its
    step only, nothing is lost or seen twice. An image at which it happens twice counts as
    unreadable.

    Raises DataWorkerDied when processes go on dying, and what `dataset.batch` raises.
    """
    make = Maker(dataset, order, rows)
    if dataset.prefetch == 0:
        return map(make, range(start, stop))
    if processes and isinstance(dataset, FileDataset):
        return _by_processes(make, dataset, start, stop, processes)
    return _by_thread(make, start, stop)


def _by_thread(make: Maker, start: int, stop: int) -> Iterator[Batch]:
    with ThreadPoolExecutor(1, "tim-prefetch") as reader:
        ready: deque[Future[Batch]] = deque()
        try:
            for step in range(start, stop):
                ready.append(reader.submit(make, step))
                if len(ready) > make.dataset.prefetch:
                    yield ready.popleft().result()
            while ready:
                yield ready.popleft().result()
        finally:
            for future in ready:
                future.cancel()


@dataclass(frozen=True)
class _Made:
    """What a worker process answers: a batch, or what was raised in place of one."""

    batch: Batch | None
    unreadable: dict[int, str]
    error: str = ""
    is_of_the_data: bool = False


class _Steps(TorchDataset):
    """Batches by number of the step, for a DataLoader."""

    def __init__(self, make: Maker, places: Tensor) -> None:
        self.make, self.places = make, places

    def __getitem__(self, step: int) -> _Made:
        worker = get_worker_info().id
        dataset = self.make.dataset
        assert isinstance(dataset, FileDataset)
        dataset.tell_place(self.places[worker])
        try:
            return _Made(self.make(step), dataset.unreadable())
        except Exception as error:
            place = int(self.places[worker])
            at = f" at {dataset.name_of(place)}" if place >= 0 else ""
            told = " ".join(str(error).split())
            message = f"data worker {worker}{at}: {type(error).__name__}: {told}"
            return _Made(None, dataset.unreadable(), message, isinstance(error, ValueError))


def _unchanged(made: _Made) -> _Made:
    return made


def _by_processes(
    make: Maker, dataset: FileDataset, start: int, stop: int, processes: int
) -> Iterator[Batch]:
    step, deaths, at = start, 0, dict[int, int]()
    while step < stop:
        workers = _Workers(make, range(step, stop), min(processes, stop - step))
        try:
            for made in workers:
                dataset.skip(made.unreadable)
                if made.batch is None:
                    raise (ValueError if made.is_of_the_data else RuntimeError)(made.error)
                yield made.batch
                step, deaths = step + 1, 0
        except _Died as death:
            deaths += 1
            name = ""
            if death.place >= 0:
                name = f" while it read {dataset.name_of(death.place)}"
                at[death.place] = at.get(death.place, 0) + 1
                if at[death.place] >= MAX_DEATHS_AT_ONE:
                    dataset.skip({death.place: f"it killed data workers: {death}"})
            told = f"data worker {death.worker} {death}{name}"
            if deaths >= MAX_DEATHS:
                raise DataWorkerDied(
                    f"{told}; {deaths} died without a batch in between: give fewer "
                    "data.processes if memory is short, 0 for threads"
                ) from None
            logging.getLogger("tim.data").warning("%s; reading on from step %d", told, step)
        finally:
            workers.close()


class _Died(Exception):
    """A worker process died: which, of what, and at which image (-1: none)."""

    def __init__(self, worker: int, process: BaseProcess, place: int) -> None:
        code = process.exitcode or 0
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        super().__init__(f"(process {process.pid}) {how}")
        self.worker, self.place = worker, place


class _Workers:
    """Processes that make the batches of some steps, in order."""

    def __init__(self, make: Maker, steps: range, count: int) -> None:
        # A server forks them that has never had a GPU, a lock on the run or threads to inherit.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tim.data.reading", "tim.data.images"])
        self.places = torch.full((count, 1), -1).share_memory_()
        loader = DataLoader(
            _Steps(make, self.places),
            batch_size=None,
            sampler=steps,
            collate_fn=_unchanged,
            num_workers=count,
            multiprocessing_context=context,
            # Else it draws from the stream of the process, which is not its.
            generator=torch.Generator(),
        )
        self._made: Iterator[_Made] | None = iter(loader)
        # It has no public name for them.
        self.processes: list[BaseProcess] = list(self._made._workers)  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[_Made]:
        while True:
            death = None
            try:
                made = next(self._made)  # type: ignore[arg-type]
            except StopIteration:
                return
            # RuntimeError for a process that is found dead, the others for a tensor of such a one.
            except (RuntimeError, OSError, EOFError):
                if (death := self._death()) is None:
                    raise
            # Not above: an error that goes with it would keep the loader, and so its processes.
            if death is not None:
                raise death
            yield made

    def _death(self) -> _Died | None:
        wait([process.sentinel for process in self.processes], timeout=1)
        for worker, process in enumerate(self.processes):
            if process.exitcode is not None:
                return _Died(worker, process, int(self.places[worker]))
        return None

    def close(self) -> None:
        """Have the processes end, by the loader's own means if they still can."""
        self._made = None
        for process in self.processes:
            process.join(timeout=5)
            process.kill()
