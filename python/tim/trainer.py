"""Training of one model, in one process or several: `Trainer(config, run).train()`.

Everything random in step s (which images, their augmentation, noise, times, dropped labels) is a
function of (seed, s), and a checkpoint holds the rest (weights, averages, optimizer), so a run that
is killed and resumed ends with the same bits as one that is not, and on another number of processes
with the same numbers but for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from tim import conditions
from tim.checkpoint import (
    CheckpointStore,
    SaveFailed,
    Training,
    random_states,
    remove_leftovers,
    seed_everything,
    set_random_states,
)
from tim.config import RunConfig
from tim.data import Batch, Dataset, batches, build_dataset, build_order
from tim.ema import EMA
from tim.graphs import check_device
from tim.grid import image_grid, pixels_of, save_picture
from tim.meter import DATA, Clock, Meter
from tim.models import TiM
from tim.parallel import (
    Heartbeat,
    StopRequest,
    build_spread,
    check_spread,
    join,
    known_to_all,
    pick_device,
)
from tim.run_directory import CONFIG, check_directory, check_resumable, fit_to_data
from tim.run_lock import RunLock
from tim.run_log import NoLog, RunLog, open_log, peak_memory_gb
from tim.sampler import sample
from tim.step import COMMUNICATION, TrainingStep, learning_rate
from tim.text import TextEncoder

if TYPE_CHECKING:
    from tim.profiling import StepProfile

__all__ = ["READ_EVERY", "Trainer", "TrainingStopped", "pick_device", "sample_rows"]

#: Most steps between two reads of the device.
READ_EVERY = 50


class TrainingStopped(RuntimeError):
    """Too many steps in a row were not finite, or the weights are not."""


class Trainer:
    """Trains the model of `config` and keeps the run directory `run`.

    A run directory holds config.yaml, log.jsonl, checkpoints/ and samples/. `dataset` replaces the
    one that `config.data` describes. `encoder(x, y)` gives the features [B, N, z_dim] for the
    projection loss where the data set does not bring them, `text` those of captions; by default
    they are what `config.data` names.

    Started by a launcher such as torchrun, the processes train one model together, as
    `config.parallel` says; every one of them makes a Trainer and calls `train`.

    Raises:
        FileExistsError: `run` holds a run already and `resume` is not set.
        BlockingIOError: another process trains in `run`.
        ValueError: the data do not fit the model; or, resuming, all checkpoints are damaged, or
            `config` differs from the run's in a field that matters (the field is named).
    """

    def __init__(
        self,
        config: RunConfig,
        run: str | Path,
        *,
        resume: bool = False,
        dataset: Dataset | None = None,
        encoder: conditions.Encoder | None = None,
        text: TextEncoder | None = None,
    ):
        self.run = Path(run)
        train, parallel = config.train, config.parallel
        self.world = world = join(train.device, parallel.backend, parallel.timeout)
        # Its command line may have seen the directory before another rank wrote to it.
        config = world.from_main(lambda: config)
        world.from_main(lambda: check_directory(self.run, resume))
        self.dataset = world.together(
            lambda: dataset if dataset is not None else build_dataset(config.data)
        )
        if len(set(sizes := world.exchange(len(self.dataset)))) > 1:
            raise known_to_all(ValueError(f"all ranks must have the same data, got {sizes} images"))
        self.config = config = world.together(lambda: fit_to_data(config, self.dataset))
        world.together(lambda: check_spread(config, world))
        self.order = world.together(lambda: build_order(config, self.dataset))
        self.device = world.device
        #: Captions that were too long, and what is still to be told about the first of them.
        self.cut_captions, self._cut = 0, ""
        if train.cuda_graph:
            check_device(self.device, "train.cuda_graph")
        self.text, encoder = world.together(lambda: self._encoders(text, encoder))
        loss = config.objective.build(config.transport.build())
        self._lock = RunLock(self.run)
        world.from_main(lambda: self._claim(resume))

        seed_everything(train.seed)
        self.model = TiM(config.model).to(self.device)
        self.model.gradient_checkpointing = train.gradient_checkpointing
        self.ema = EMA(self.model)
        features = encoder is not None or self.dataset.has_features
        self.spread = build_spread(config, world, self.model, self.ema.model, loss, features)
        self.heartbeat = Heartbeat(world, parallel.timeout)
        self.clock = Clock(self.device, lambda phase: self.heartbeat.beat(self.step, phase))
        self.training_step = TrainingStep(
            self.model, self.ema, loss, config, encoder, self.text, self.spread, self.clock.mark
        )
        self.spread.collective = lambda: self.clock.begin(COMMUNICATION)
        self.training_step.images = self.order.images_per_step
        self.parameters = self.training_step.parameters
        self.optimizer = self.training_step.optimizer
        self.step = 0
        self.skipped = self.bad_in_row = 0
        #: What was wrong with newer checkpoints than the one restored.
        self._damaged: list[str] = []
        #: Values of the steps since the last read, on the device.
        self._unread: list[Tensor] = []

        sharded = world.size > 1 and parallel.strategy != "ddp"
        self.store = CheckpointStore(self.run / "checkpoints", train.keep, world, sharded)
        self._training = Training(self.model, self.ema.model, self.optimizer)
        self._restore()
        world.from_main(lambda: config.save(self.run / CONFIG))

    def _rows(self, images: int) -> np.ndarray | None:
        """Which of a step's images are this rank's."""
        return self.spread.rows(images, self.config.train.accumulate)

    def _encoders(
        self, text: TextEncoder | None, encoder: conditions.Encoder | None
    ) -> tuple[TextEncoder | None, conditions.Encoder | None]:
        text = text or conditions.text_encoder(self.config, self.device)
        encoder = encoder or conditions.feature_encoder(self.config, self.device)
        conditions.check(self.config, self.dataset, text, encoder, self.device)
        if text is not None:
            text.tell_cut = self._count_cut
        return text, encoder

    def _count_cut(self, message: str, count: int) -> None:
        if not self.cut_captions:
            self._cut = message
        self.cut_captions += count

    def _claim(self, resume: bool) -> None:
        """Make the directory this run's, before anything in it is touched."""
        fresh = not self.run.exists()
        self.run.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        try:
            # Another process may have been here since the first look.
            check_directory(self.run, resume)
            if (self.run / CONFIG).exists():
                check_resumable(RunConfig.load(self.run / CONFIG), self.config)
        except BaseException:
            self._lock.release()
            if fresh and not any(self.run.iterdir()):
                self.run.rmdir()
            raise
        remove_leftovers(self.run / "checkpoints")

    def train(self, profile: bool = False) -> None:
        """Take the steps that are left and save the last one; SIGTERM saves and returns early.

        The host reads results at records of the log, sample grids and checkpoints, and at least
        every `READ_EVERY` steps; between reads it runs ahead of the device. So TrainingStopped, for
        `train.max_bad_steps` steps in a row that had to be skipped, comes up to that many steps
        late, which does no harm: skipped steps change nothing. It is also raised in place of saving
        weights that are not finite.

        `profile` records a few of the steps, as `tim.profiling.StepProfile` says.

        Raises SaveFailed when the last checkpoint cannot be written; where it is one before, the
        log says so and training goes on.
        """
        train = self.config.train
        self.world.from_main(self._lock.acquire)
        try:
            with open_log(self.run, self.step, train, self.world.is_main) as log:
                self._train_logged(log, profile)
            self.world.close()
        finally:
            if self.world.is_main:
                self._lock.release()

    def _train_logged(self, log: RunLog | NoLog, profile: bool) -> None:
        profiler = self._profile(log) if profile else None
        event = "resume" if self.step else "start"
        parameters = sum(p.numel() for p in self.parameters)
        ranks = {"ranks": self.world.size} if self.world.size > 1 else {}
        log.event(self.step, event=event, parameters=parameters, **ranks)
        for reason in self._damaged:
            log.event(self.step, event="damaged_checkpoint", reason=reason)
            log.note(f"{reason}; going on from step {self.step}")
        try:
            with self.heartbeat, StopRequest(self.world) as stop, profiler or nullcontext():
                self._train(log, stop, profiler)
        except TrainingStopped:
            log.event(self.step, event="stopped", bad_in_row=self.bad_in_row)
            raise

    def _profile(self, log: RunLog | NoLog) -> StepProfile:
        # Imported here: other runs have no use for it.
        from tim.profiling import StepProfile

        arguments = (self.run, self.world, log, self.step, self.config.train.steps)
        return self.world.together(lambda: StepProfile(*arguments))

    def _train(
        self, log: RunLog | NoLog, stop: StopRequest, profiler: StepProfile | None = None
    ) -> None:
        train = self.config.train
        meter = Meter()
        due = False
        budget = self.config.data.token_budget
        rows = self._rows(train.batch_size) if budget is None else self._rows
        self.clock.mark(DATA)
        processes = self.config.data.processes
        source = batches(self.dataset, self.order, self.step, train.steps, rows, processes)
        for batch in profiler.batches(source) if profiler else source:
            self.train_step(batch)
            if profiler:
                self.clock.mark(None)
                self.heartbeat.beat(self.step, "profile")
                profiler.step()
            log.advance(self.step)
            stopped = stop.agreed(self.step)
            last = stopped or self.step == train.steps
            logged = last or self.step % train.log_every == 0
            pictured = train.sample_every and (last or self.step % train.sample_every == 0)
            due = due or last or self.step % train.checkpoint_every == 0
            if not (logged or pictured or due or len(self._unread) >= READ_EVERY):
                self.clock.mark(DATA)
                continue
            self.clock.mark(None)
            meter.add(self._read(), self.clock.read())
            if logged:
                self._log(log, meter)
                meter = Meter()
            if pictured and not stopped:
                self.heartbeat.beat(self.step, "samples")
                self._sample(log)
            # The weights of a streak of bad steps may be past saving, and would push out good
            # checkpoints: the step that ends the streak is saved instead.
            if last or (due and self.bad_in_row == 0):
                self.heartbeat.beat(self.step, "saving")
                self._save(log, last)
                due = False
            if stopped:
                log.event(self.step, event="terminated")
                log.note(f"told to stop: saved step {self.step}; --resume goes on from there")
                break
            meter.resume()
            self.clock.mark(DATA)

    def train_step(self, batch: Batch) -> Tensor:
        """One step of the optimizer on a batch of `train.batch_size` images.

        Returns the step's `tim.step.VALUES` [4], on the device: nothing here waits for it. A step
        whose values are not all finite has changed nothing.
        """
        with record_function(DATA):
            self.training_step.load(batch, self.step)
        values = self.training_step.run()
        self._unread.append(values)
        self.step += 1
        return values

    def _read(self) -> list[list[float]]:
        """Wait for the device; returns the values of the steps since the last read."""
        steps = torch.stack(self._unread).tolist() if self._unread else []
        self._unread.clear()
        limit = self.config.train.max_bad_steps
        for values in steps:
            bad = not all(map(math.isfinite, values))
            self.skipped += bad
            self.bad_in_row = self.bad_in_row + 1 if bad else 0
            if self.bad_in_row >= limit:
                raise TrainingStopped(
                    f"stopped at step {self.step}: the loss or the gradient was not finite in "
                    f"{limit} steps in a row (train.max_bad_steps)"
                )
        return steps

    def _finite(self) -> bool:
        values = [*self.parameters, *self.ema.model.parameters()]
        mine = torch.stack([self.spread.held(value).isfinite().all() for value in values]).all()
        return all(self.world.exchange(bool(mine)))

    def save(self, wait: bool = True) -> None:
        """Write a checkpoint of the current step; without `wait`, beside the steps that follow.

        Raises TrainingStopped when the weights are not finite, or too many steps were skipped, and
        SaveFailed when this checkpoint or, without `wait`, the one before it cannot be written.
        """
        self._read()
        if not self._finite():
            raise TrainingStopped(f"stopped at step {self.step}: the weights are not finite")
        state = {"step": self.step, "images": len(self.dataset), "skipped": self.skipped}
        if self.world.size == 1:
            state["random"] = random_states(self.device)
        self.store.save(self.step, self._training, state)
        # With nothing else to do it is quicker to write than to copy and then write.
        if wait or (self.world.size == 1 and self.device.type == "cpu"):
            self.store.wait()

    def _save(self, log: RunLog | NoLog, last: bool) -> None:
        """Save; a failure is an error at the last step only, and else a line in the log."""

        def attempt(call: Callable[[], None], last: bool) -> None:
            try:
                call()
            except SaveFailed as error:
                if last:
                    raise
                log.event(self.step, event="save_failed", reason=str(error))
                log.note(f"{error}; training goes on, the checkpoints before it are whole")

        attempt(self.store.wait, last=False)
        attempt(lambda: self.save(wait=last), last)

    def _restore(self) -> None:
        found = self.store.restore(self._training)
        if found is None:
            return
        state = found.state
        if state["images"] != len(self.dataset):
            raise known_to_all(
                ValueError(
                    f"the data now hold {len(self.dataset)} images, those of {found.path} were "
                    f"{state['images']}: the run cannot go on as it began"
                )
            )
        self.step, self.skipped = state["step"], state["skipped"]
        if "random" in state:
            set_random_states(state["random"], self.device)
        self._damaged = found.damaged

    def _log(self, log: RunLog | NoLog, meter: Meter) -> None:
        mine = (meter.phases, peak_memory_gb(self.device), self.dataset.skipped)
        phases, memory, skipped = zip(*self.world.exchange(mine), strict=True)
        meter.phases = {name: sum(p[name] for p in phases) / len(phases) for name in phases[0]}
        values = meter.values(self.order.images_per_step)
        values["lr"] = learning_rate(self.step - 1, self.config.train)
        values["memory_gb"] = max(memory)
        values["skipped_steps"] = self.skipped
        if self.cut_captions:
            values["cut_captions"] = self.cut_captions
        if self._cut:
            log.note(f"{self._cut} (data.max_tokens); the log counts them as cut_captions")
            self._cut = ""
        log.scalars(self.step, values)
        log.skipped_files(self.step, {name: why for part in skipped for name, why in part.items()})

    def _sample(self, log: RunLog | NoLog) -> None:
        if not (self.world.is_main or self.spread.is_sharded):
            return
        config = self.config.sample
        shown = conditions.shown(self.config, self.dataset)
        try:
            pictures = sample_rows(self.ema.model, self.config, shown, self.device, self.text)
            rows = [self.dataset.decode(x) for x in pictures]
        except ValueError as error:
            log.note(f"no sample grid: {error}")
            return
        if self.world.is_main:
            grid = image_grid(rows, config.steps)
            save_picture(grid, self.run / "samples" / f"{self.step:08d}.png")
            log.picture(self.step, "samples", pixels_of(grid))


def sample_rows(
    model: TiM,
    config: RunConfig,
    shown: list[int] | list[str],
    device: torch.device,
    text: TextEncoder | None = None,
    cuda_graph: bool = False,
) -> list[Tensor]:
    """Samples [B, C, H, W] of B classes, or of B prompts that `text` encodes, for each entry of
    `sample.steps`, all from the same noise."""
    settings = config.sample
    if text is None:
        y, null = torch.tensor(shown, device=device), model.null_condition(len(shown))
    else:
        y, null = text.with_null(shown)
    shape = (len(shown), config.model.in_channels, *[config.model.input_size] * 2)
    # Drawn on the CPU, so that a seed means the same pictures on every device.
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(settings.seed)).to(device)
    return [
        sample(
            model,
            y,
            noise,
            steps=steps,
            transport=config.transport.build(),
            cfg_scale=settings.cfg_scale,
            cfg_interval=settings.cfg_interval,
            null=null,
            cuda_graph=cuda_graph,
            **config.objective.schedule(*shape[2:]),
        )
        for steps in settings.steps
    ]
