"""Training of one model in one process: `Trainer(config, run).train()`.

Everything random in step s (which images, their augmentation, noise, times, dropped labels) is a
function of (seed, s), and a checkpoint holds the rest (weights, averages, optimizer), so a run that
is killed and resumed ends with the same bits as one that is not.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tim import conditions
from tim.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    random_states,
    remove_leftovers,
    save_checkpoint,
    seed_everything,
    set_random_states,
)
from tim.config import RunConfig, differences
from tim.data import Batch, BatchOrder, Dataset, batches, build_dataset
from tim.data.latents import LatentShards
from tim.ema import EMA
from tim.graphs import check_device
from tim.grid import image_grid, pixels_of, save_picture
from tim.models import TiM
from tim.run_log import RunLog, peak_memory_gb
from tim.sampler import sample
from tim.step import VALUES, TrainingStep, learning_rate
from tim.text import TextEncoder

#: What a resumed run may change: it does not enter the arithmetic of the steps already taken.
CHANGEABLE = (
    "train.steps", "train.checkpoint_every", "train.keep", "train.log_every", "train.sample_every",
    "train.tensorboard", "train.max_bad_steps", "train.device", "train.gradient_checkpointing",
    "train.cuda_graph", "sample.", "data.path", "data.workers", "data.cache_gb", "data.vae",
)  # fmt: skip
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

    Raises:
        FileExistsError: `run` holds a run already and `resume` is not set.
        ValueError: the data do not fit the model; or, resuming, the newest checkpoint is damaged,
            or `config` differs from the run's in a field that matters (the field is named).
    """

    def __init__(
        self,
        config: RunConfig,
        run: str | Path,
        *,
        resume: bool = False,
        dataset: Dataset | None = None,
        encoder: Callable[[Tensor, Tensor], Tensor] | None = None,
        text: TextEncoder | None = None,
    ):
        self.run = Path(run)
        saved = self.run / "config.yaml"
        if saved.exists() and not resume:
            raise FileExistsError(f"{self.run} holds a run: resume it, or take another directory")
        if not saved.exists() and self.run.exists() and any(self.run.iterdir()):
            raise FileExistsError(f"{self.run} is not empty and holds no run: take another")
        self.dataset = dataset if dataset is not None else build_dataset(config.data)
        config = _fit_to_data(config, self.dataset)
        if saved.exists():
            check_resumable(RunConfig.load(saved), config)

        self.config = config
        train = config.train
        self.device = pick_device(train.device)
        if train.cuda_graph:
            check_device(self.device, "train.cuda_graph")
        self.text = text or conditions.text_encoder(config, self.device)
        encoder = encoder or conditions.feature_encoder(config, self.device)
        conditions.check(config, self.dataset, self.text, encoder, self.device)
        seed_everything(train.seed)
        self.model = TiM(config.model).to(self.device)
        self.model.gradient_checkpointing = train.gradient_checkpointing
        self.ema = EMA(self.model)
        loss = config.objective.build(config.transport.build())
        self.training_step = TrainingStep(self.model, self.ema, loss, config, encoder, self.text)
        self.parameters = self.training_step.parameters
        self.optimizer = self.training_step.optimizer
        self.order = BatchOrder(len(self.dataset), train.batch_size, train.seed)
        self.step = 0
        self.skipped = self.bad_in_row = 0
        #: Values of the steps since the last read, on the device.
        self._unread: list[Tensor] = []

        self.run.mkdir(parents=True, exist_ok=True)
        self.checkpoints = self.run / "checkpoints"
        remove_leftovers(self.checkpoints)
        if (newest := latest_checkpoint(self.checkpoints)) is not None:
            self._restore(newest)
        config.save(saved)

    def train(self) -> None:
        """Take the steps that are left and save the last one.

        The host reads results at records of the log, sample grids and checkpoints, and at least
        every `READ_EVERY` steps; between reads it runs ahead of the device. So TrainingStopped, for
        `train.max_bad_steps` steps in a row that had to be skipped, comes up to that many steps
        late, which does no harm: skipped steps change nothing. It is also raised in place of saving
        weights that are not finite.
        """
        train = self.config.train
        with RunLog(
            self.run, start_step=self.step, steps=train.steps, tensorboard=train.tensorboard
        ) as log:
            parameters = sum(p.numel() for p in self.parameters)
            event = "resume" if self.step else "start"
            log.event(self.step, event=event, parameters=parameters)
            try:
                self._train(log)
            except TrainingStopped:
                log.event(self.step, event="stopped", bad_in_row=self.bad_in_row)
                raise

    def _train(self, log: RunLog) -> None:
        train = self.config.train
        meter = _Meter()
        due = False
        for batch in batches(self.dataset, self.order, self.step, train.steps):
            self.train_step(batch)
            log.advance(self.step)
            last = self.step == train.steps
            logged = last or self.step % train.log_every == 0
            pictured = train.sample_every and (last or self.step % train.sample_every == 0)
            due = due or last or self.step % train.checkpoint_every == 0
            if not (logged or pictured or due or len(self._unread) >= READ_EVERY):
                continue
            meter.add(self._read())
            if logged:
                self._log(log, meter)
                meter = _Meter()
            if pictured:
                self._sample(log)
            # The weights of a streak of bad steps may be past saving, and would push out good
            # checkpoints: the step that ends the streak is saved instead.
            if last or (due and self.bad_in_row == 0):
                self.save()
                due = False
            meter.resume()

    def train_step(self, batch: Batch) -> Tensor:
        """One step of the optimizer on a batch of `train.batch_size` images.

        Returns the step's `tim.step.VALUES` [4], on the device: nothing here waits for it. A step
        whose values are not all finite has changed nothing.
        """
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
        return bool(torch.stack([value.isfinite().all() for value in values]).all())

    def save(self) -> None:
        """Write a checkpoint of the current step.

        Raises TrainingStopped when the weights are not finite, or too many steps were skipped.
        """
        self._read()
        if not self._finite():
            raise TrainingStopped(f"stopped at step {self.step}: the weights are not finite")
        state = {
            "step": self.step,
            "images": len(self.dataset),
            "skipped": self.skipped,
            "optimizer": self.optimizer.state_dict(),
            "random": random_states(self.device),
        }
        keep = self.config.train.keep
        save_checkpoint(self.checkpoints, self.step, self.model, self.ema.model, state, keep)

    def _restore(self, path: Path) -> None:
        state = load_checkpoint(path, self.model, self.ema.model)
        if state["images"] != len(self.dataset):
            raise ValueError(
                f"the data now hold {len(self.dataset)} images, those of {path} were "
                f"{state['images']}: the run cannot go on as it began"
            )
        self.training_step.load_state_dict(state["optimizer"])
        self.step, self.skipped = state["step"], state["skipped"]
        set_random_states(state["random"], self.device)

    def _log(self, log: RunLog, meter: _Meter) -> None:
        values = meter.values(self.config.train.batch_size)
        values["lr"] = learning_rate(self.step - 1, self.config.train)
        values["memory_gb"] = peak_memory_gb(self.device)
        values["skipped_steps"] = self.skipped
        log.scalars(self.step, values)
        log.skipped_files(self.step, self.dataset.skipped)

    def _sample(self, log: RunLog) -> None:
        config = self.config.sample
        shown = conditions.shown(self.config, self.dataset)
        try:
            pictures = sample_rows(self.ema.model, self.config, shown, self.device, self.text)
            rows = [self.dataset.decode(x) for x in pictures]
        except ValueError as error:
            log.note(f"no sample grid: {error}")
            return
        grid = image_grid(rows, config.steps)
        save_picture(grid, self.run / "samples" / f"{self.step:08d}.png")
        log.picture(self.step, "samples", pixels_of(grid))


class _Meter:
    """Means and speed of the steps since the last record."""

    def __init__(self) -> None:
        self.steps: list[list[float]] = []
        self.seconds = 0.0
        self.resume()

    def resume(self) -> None:
        """What happened since the last `add` (sampling, saving) does not count as training time."""
        self._since = time.perf_counter()

    def add(self, steps: list[list[float]]) -> None:
        """The `VALUES` of some steps, which have just been read from the device."""
        self.steps += steps
        self.seconds += time.perf_counter() - self._since
        self.resume()

    def values(self, batch_size: int) -> dict[str, float]:
        """Means over the steps that were not skipped (nan if none), and the speed over all."""
        rate = len(self.steps) / self.seconds
        taken = [v for v in self.steps if all(map(math.isfinite, v))]
        means = {
            name: sum(v[i] for v in taken) / len(taken) if taken else math.nan
            for i, name in enumerate(VALUES)
        }
        return {**means, "steps_per_second": rate, "images_per_second": rate * batch_size}


def sample_rows(
    model: TiM,
    config: RunConfig,
    shown: list[int] | list[str],
    device: torch.device,
    text: TextEncoder | None = None,
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
            **config.objective.schedule(*shape[2:]),
        )
        for steps in settings.steps
    ]


def check_resumable(saved: RunConfig, config: RunConfig) -> None:
    """ValueError naming the first field in which `config` cannot continue the run of `saved`."""
    for name, old, new in differences(saved, config):
        if not name.startswith(CHANGEABLE):
            raise ValueError(f"a resumed run cannot change {name}: it is {old}, got {new}")


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name} was asked for, but torch sees no CUDA device")
    return device


def _fit_to_data(config: RunConfig, dataset: Dataset) -> RunConfig:
    """The configuration with room for the data set's classes and an absolute path to it.

    Raises ValueError when the shapes of data and model differ.
    """
    model, data = config.model, config.data
    expected = (model.in_channels, model.input_size, model.input_size)
    if dataset.shape != expected:
        raise ValueError(
            "the data must have shape [C, H, W] = [model.in_channels, model.input_size, "
            f"model.input_size] = {list(expected)}, got {list(dataset.shape)}"
        )
    if data.path is not None:
        data = dataclasses.replace(data, path=str(Path(data.path).absolute()))
    if isinstance(dataset, LatentShards) and data.vae is None:
        data = dataclasses.replace(data, vae=dataset.index.vae)
    if model.num_classes is not None:
        classes = max(model.num_classes, dataset.num_classes)
        model = dataclasses.replace(model, num_classes=classes)
    return dataclasses.replace(config, model=model, data=data)
