"""What the ranks of the tests do."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from readings import no_reading
from tim.bench.step import StepSize, training_candidates
from tim.checkpoint import whole
from tim.cli import tell
from tim.config import RunConfig
from tim.data import ArrayDataset, Batch
from tim.parallel import join
from tim.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import peers


def train(config: RunConfig, run: Path, resume: bool = False) -> dict:
    """Train to the end; returns the steps' values and the weights as they are in one process."""
    trainer = Trainer(config, run, resume=resume)
    values = []
    step = trainer.train_step

    def noted(batch) -> Tensor:
        values.append(step(batch))
        return values[-1]

    trainer.train_step = noted
    first = trainer.step
    trainer.train()
    return {"first": first, "values": torch.stack(values), "weights": gathered(trainer)}


def train_all(configs: dict[str, RunConfig], folder: Path) -> dict[str, dict]:
    """Several runs one after the other."""
    return {name: train(config, folder / name) for name, config in configs.items()}


def gathered(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, averages and moments, each whole."""
    kinds = {"model": trainer.model.state_dict(), "ema": trainer.ema.model.state_dict()}
    for name, state in trainer._training.optimizer_state().items():
        kinds[f"optimizer.{name}"] = {key: state[key] for key in ("exp_avg", "exp_avg_sq")}
    mine = {
        f"{kind}.{name}": value for kind, values in kinds.items() for name, value in values.items()
    }
    held = {
        name: (value.to_local() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in mine.items()
    }
    # One message, where full_tensor() of each would be hundreds.
    parts = trainer.world.exchange(held)
    return {
        name: _whole(value, [part[name] for part in parts], trainer.world.rank)
        if isinstance(value, DTensor)
        else held[name]
        for name, value in mine.items()
    }


def _whole(value: DTensor, parts: list[Tensor], rank: int) -> Tensor:
    """A tensor of which the ranks hold some rows each, from those that share this rank's copy."""
    assert value.placements[-1] == Shard(0)
    groups = value.device_mesh.mesh.view(-1, value.device_mesh.size(-1)).tolist()
    (group,) = (group for group in groups if rank in group)
    whole = torch.cat([parts[other] for other in group])
    assert whole.shape == value.shape
    return whole


def train_noting_images(config: RunConfig, run: Path) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Go on with a run on numbered images; which images each step saw here, and the weights."""
    dataset = NumberedImages()
    trainer = Trainer(config, run, resume=True, dataset=dataset)
    dataset.seen.clear()  # the trainer has had a look
    trainer.train()
    return dataset.seen, gathered(trainer)


class NumberedImages(ArrayDataset):
    """Noise of as many classes as images: 60, which is no multiple of a batch."""

    def __init__(self) -> None:
        images = np.random.default_rng(0).standard_normal((60, 1, 8, 8)).astype(np.float32)
        super().__init__(images, np.arange(60), num_classes=60, flip=0.5)
        self.seen: list[list[int]] = []

    def batch(self, *arguments) -> Batch:
        batch = super().batch(*arguments)
        self.seen.append(batch.y.tolist())
        return batch


def train_slowly(config: RunConfig, run: Path, seconds: float) -> None:
    """Steps that take their time, so that something can happen in one."""
    trainer = Trainer(config, run)
    step = trainer.train_step

    def slow(batch: Batch) -> Tensor:
        time.sleep(seconds)
        return step(batch)

    trainer.train_step = slow
    trainer.train()


def train_with_slow_writing(config: RunConfig, run: Path, seconds: float) -> None:
    """Writing takes `seconds` for every tensor of a sharded checkpoint, or file of a whole one."""
    from torch.distributed.checkpoint import filesystem

    for module, name in ((filesystem, "_write_item"), (whole, "save_weights")):
        setattr(module, name, after_sleeping(seconds, getattr(module, name)))
    Trainer(config, run).train()


def after_sleeping(seconds: float, function):
    def slow(*arguments, **options):
        time.sleep(seconds)
        return function(*arguments, **options)

    return slow


def train_on_a_full_disk(config: RunConfig, run: Path, rank: int, full: range) -> None:
    """On one rank the system does not let files grow while the steps `full` are taken."""
    trainer = Trainer(config, run)
    step = trainer.train_step
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(batch: Batch) -> Tensor:
        if trainer.world.rank == rank:
            limit = 4096 if trainer.step in full else hard
            trainer.store.wait = with_limit(limit, hard, type(trainer.store).wait, trainer.store)
            trainer.store.save = with_limit(limit, hard, type(trainer.store).save, trainer.store)
        return step(batch)

    trainer.train_step = limited
    trainer.train()


def with_limit(limit: int, hard: int, method, store):
    """The method of the store, with files limited in size until what it began is written."""

    def limited(*arguments):
        before, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            method(store, *arguments)
            if store._pending is not None:
                store._pending.exception()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))

    return limited


def train_with_a_bad_image(config: RunConfig, run: Path) -> dict:
    """One of the images is not finite: it is on one rank only when its turn comes."""
    dataset = NumberedImages()
    dataset.images[5] = torch.nan
    trainer = Trainer(config, run, dataset=dataset)
    dataset.seen.clear()
    before, changed = gathered(trainer), []
    step = trainer.train_step

    def watched(batch: Batch) -> Tensor:
        nonlocal before
        values = step(batch)
        after = gathered(trainer)
        changed.append(any(not after[k].equal(before[k]) for k in after if k in before))
        before = after
        return values

    trainer.train_step = watched
    trainer.train()
    seen = [5 in images for images in dataset.seen]
    return {"changed": changed, "skipped": trainer.skipped, "weights": before, "seen": seen}


def train_killing_a_data_worker(config: RunConfig, run: Path) -> dict:
    """After two steps rank 1 loses a process that decodes for it."""
    trainer = Trainer(config, run)
    step, killed = trainer.train_step, []

    def watched(batch: Batch) -> Tensor:
        if trainer.step == 2 and trainer.world.rank == 1:
            victim = multiprocessing.active_children()[0]
            os.kill(victim.pid, signal.SIGKILL)
            killed.append(victim.pid)
        return step(batch)

    trainer.train_step = watched
    trainer.train()
    return {"killed": killed, "weights": gathered(trainer)}


def try_to_train(config: RunConfig, run: Path, resume: bool) -> str:
    """The error of a run that is refused."""
    try:
        Trainer(config, run, resume=resume)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def what_a_refused_run_tells(config: RunConfig, run: Path) -> tuple[str, str]:
    """Its error, and what the command line says of it on this rank."""
    told = io.StringIO()
    try:
        Trainer(config, run)
    except (OSError, ValueError) as error:
        with contextlib.redirect_stderr(told):
            tell("told", error)
        return f"{type(error).__name__}: {error}", told.getvalue()
    return "not refused", ""


def try_to_train_on_other_data(config: RunConfig, run: Path) -> str:
    """The error where the last rank has an image less than the others."""
    dataset = NumberedImages()
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        dataset.images, dataset.labels = dataset.images[1:], dataset.labels[1:]
    try:
        Trainer(config, run, dataset=dataset)
    except ValueError as error:
        return str(error)
    return "not refused"


def train_with_profile(config: RunConfig, run: Path) -> None:
    Trainer(config, run).train(profile=True)


def operations_of_steps(configs: list[RunConfig], folder: Path) -> list[Counter[str]]:
    """How often the third step of each run calls which operation."""
    found = []
    for number, config in enumerate(configs):
        trainer = Trainer(config, folder / str(number))
        for _ in range(2):  # DDP sorts its buckets after the first
            trainer.train_step(_batch(trainer))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            trainer.train_step(_batch(trainer))
        found.append(Counter(event.name for event in profiler.events()))
        trainer._lock.release()
    return found


def timed_collectives(config: RunConfig, folder: Path) -> tuple[int, int, dict[str, int]]:
    """Of a step: how many times of collectives begin and end, and the collectives by their kind."""
    trainer = Trainer(config, folder / "run")
    trainer.train_step(_batch(trainer))
    begun, ended = [], []

    def begin() -> Callable[[], None]:
        begun.append(None)
        return lambda: ended.append(None)

    trainer.spread.collective = begin
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        trainer.train_step(_batch(trainer))
    names = ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_", "c10d::allreduce_")
    counts = Counter(event.name for event in profiler.events() if event.name in names)
    # The loss and the norm of the gradient are summed too, over all ranks.
    counts["c10d::allreduce_"] -= 2
    return len(begun), len(ended), dict(+counts)


def step_without_reading(config: RunConfig, run: Path) -> bool:
    """Two steps that may not read; whether their values are finite."""
    trainer = Trainer(config, run)
    for number in range(2):
        trainer.training_step.load(_batch(trainer), number)
        with no_reading():
            values = trainer.training_step.run()
    return bool(values.isfinite().all())


def _batch(trainer: Trainer) -> Batch:
    """This rank's part of the first images."""
    train = trainer.config.train
    rows = trainer.spread.rows(train.batch_size, train.accumulate)
    return trainer.dataset.batch(rows, np.random.default_rng(0))


def sums_of_the_benchmark(size: StepSize) -> dict[str, tuple[int, bool]]:
    """Of each candidate of `tim bench training`: all-reduces of a step, and whether it has dF."""
    world = join("cpu", timeout=60)
    candidates, exact = training_candidates(size, torch.float32, world, False, peers)
    found = {}
    for name, candidate in candidates.items():
        _, derivative = candidate.objective()
        candidate.step()()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            candidate.step()()
        names = [event.name for event in profiler.events()]
        close = torch.allclose(derivative, exact.float(), rtol=1e-2, atol=1e-2)
        found[name] = names.count("c10d::allreduce_"), close
    return found
