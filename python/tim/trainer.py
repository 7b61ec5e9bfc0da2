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
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from tim.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    random_states,
    remove_leftovers,
    save_checkpoint,
    seed_everything,
    set_random_states,
)
from tim.config import RunConfig, TrainConfig, differences
from tim.data import Batch, BatchOrder, Dataset, batches, build_dataset
from tim.ema import EMA, ema_weight
from tim.grid import image_grid, pixels_of
from tim.models import TiM
from tim.run_log import RunLog, peak_memory_gb
from tim.sampler import sample

#: What a resumed run may change: it does not enter the arithmetic of the steps already taken.
CHANGEABLE = (
    "train.steps", "train.checkpoint_every", "train.keep", "train.log_every", "train.sample_every",
    "train.tensorboard", "train.max_bad_steps", "train.device", "train.gradient_checkpointing",
    "sample.", "data.path", "data.workers", "data.cache_gb",
)  # fmt: skip


class TrainingStopped(RuntimeError):
    """Too many steps in a row were not finite, or the weights are not."""


class Trainer:
    """Trains the model of `config` and keeps the run directory `run`.

    A run directory holds config.yaml, log.jsonl, checkpoints/ and samples/. `dataset` replaces the
    one that `config.data` describes. `encoder(x, y)` gives the features [B, N, z_dim] for the
    projection loss where the data set does not bring them.

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
    ):
        self.run = Path(run)
        saved = self.run / "config.yaml"
        if saved.exists() and not resume:
            raise FileExistsError(f"{self.run} holds a run: resume it, or take another directory")
        if not saved.exists() and self.run.exists() and any(self.run.iterdir()):
            raise FileExistsError(f"{self.run} is not empty and holds no run: take another")
        if config.model.num_classes is None:
            raise ValueError("the trainer needs a class model so far, got a text model")
        self.dataset = dataset if dataset is not None else build_dataset(config.data)
        config = _fit_to_data(config, self.dataset)
        if saved.exists():
            check_resumable(RunConfig.load(saved), config)

        self.config, self.encoder = config, encoder
        train = config.train
        self.device = pick_device(train.device)
        seed_everything(train.seed)
        self.model = TiM(config.model).to(self.device)
        self.model.gradient_checkpointing = train.gradient_checkpointing
        self.ema = EMA(self.model)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=train.lr,
            betas=(train.beta1, train.beta2),
            eps=train.adam_eps,
            weight_decay=train.weight_decay,
            fused=True,
        )
        self.loss = config.objective.build(config.transport.build())
        self.order = BatchOrder(len(self.dataset), train.batch_size, train.seed)
        self.step = 0
        self.skipped = self.bad_in_row = 0

        self.run.mkdir(parents=True, exist_ok=True)
        self.checkpoints = self.run / "checkpoints"
        remove_leftovers(self.checkpoints)
        if (newest := latest_checkpoint(self.checkpoints)) is not None:
            self._restore(newest)
        config.save(saved)

    def train(self) -> None:
        """Take the steps that are left and save the last one.

        Raises TrainingStopped after `train.max_bad_steps` steps in a row that had to be skipped,
        and in place of saving weights that are not finite.
        """
        train = self.config.train
        resumed = self.step
        with RunLog(
            self.run, start_step=resumed, steps=train.steps, tensorboard=train.tensorboard
        ) as log:
            parameters = sum(p.numel() for p in self.parameters)
            log.event(resumed, event="resume" if resumed else "start", parameters=parameters)
            meter = _Meter()
            due = False
            for batch in batches(self.dataset, self.order, resumed, train.steps):
                values = self.train_step(batch)
                log.advance(self.step)
                meter.add(values)
                if self.bad_in_row >= train.max_bad_steps:
                    self._stop(
                        log,
                        f"the loss or the gradient was not finite in {self.bad_in_row} steps in a "
                        "row (train.max_bad_steps)",
                    )
                last = self.step == train.steps
                if self.step % train.log_every == 0 or last:
                    self._log(log, meter)
                    meter = _Meter()
                if train.sample_every and (self.step % train.sample_every == 0 or last):
                    self._sample(log)
                due = due or self.step % train.checkpoint_every == 0 or last
                # The weights of a streak of bad steps may be past saving, and would push out good
                # checkpoints: the step that ends the streak is saved instead.
                if last or (due and self.bad_in_row == 0):
                    if not self._finite():
                        self._stop(log, "the weights are not finite")
                    self.save()
                    due = False
                meter.resume()

    def _stop(self, log: RunLog, reason: str) -> NoReturn:
        log.event(self.step, event="stopped", bad_in_row=self.bad_in_row)
        raise TrainingStopped(f"stopped at step {self.step}: {reason}")

    def _finite(self) -> bool:
        values = [*self.parameters, *self.ema.model.parameters()]
        return bool(torch.stack([value.isfinite().all() for value in values]).all())

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One step of the optimizer on a batch of `train.batch_size` images.

        The loss is the mean over the whole batch, whatever `train.accumulate`. One value is read
        back from the device in each step: whether loss and gradient are finite. When they are not,
        neither the weights nor their averages change. (The read costs the launches of one optimizer
        step, which then wait for the device; in return no skipped step can pass unnoticed.)

        Returns loss, denoising, projection and grad_norm of the step.
        """
        train = self.config.train
        lr = learning_rate(self.step, train)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(3, device=self.device)
        size = train.batch_size // train.accumulate
        for part in range(train.accumulate):
            rows = slice(part * size, (part + 1) * size)
            piece = Batch(*(None if v is None else v[rows].to(self.device) for v in batch))
            sums += self._backward(piece, part)
        if train.clip_norm > 0:
            norm = nn.utils.clip_grad_norm_(self.parameters, train.clip_norm)
        else:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
        loss, denoising, projection, grad_norm = torch.cat([sums, norm.view(1)]).tolist()
        self.step += 1
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.optimizer.step()
            self.ema.update(self.model, self._ema_weight())
            self.bad_in_row = 0
        else:
            self.skipped += 1
            self.bad_in_row += 1
        return {
            "loss": loss, "denoising": denoising, "projection": projection, "grad_norm": grad_norm,
        }  # fmt: skip

    def _backward(self, batch: Batch, part: int) -> Tensor:
        """Add the gradient of one part; returns its shares of loss, denoising and projection."""
        config, train = self.config, self.config.train
        # All draws below, and those of the objective, follow from this seed.
        torch.manual_seed(_seed(train.seed, self.step, part))
        x, y, features = batch
        if features is None and self.encoder is not None:
            with torch.no_grad():
                features = self.encoder(x, y)
        # Not randn_like, which draws in the order of x's strides.
        z = torch.randn(x.shape, dtype=x.dtype, device=x.device)
        null = self.model.null_condition(len(y))
        dropped = torch.rand(len(y), device=self.device) < config.model.class_dropout_prob
        guided = config.objective.guidance.enabled
        with torch.autocast(self.device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            out = self.loss(
                self.model,
                x,
                z,
                torch.where(dropped, null, y),
                null=null,
                y_guidance=y,
                ema_model=self.ema.model if guided else None,
                features=features,
            )
        share = 1 / train.accumulate
        total = out.loss
        if features is not None:
            total = total + config.objective.projection_weight * out.projection
        (total * share).backward()
        return share * torch.stack([total, out.denoising.mean(), out.projection]).detach()

    def _ema_weight(self) -> float:
        train = self.config.train
        return ema_weight(
            self.step * train.batch_size,
            train.batch_size,
            decay=train.ema_decay,
            halflife_images=train.ema_halflife_images,
            rampup=train.ema_rampup,
        )

    def save(self) -> None:
        """Write a checkpoint of the current step."""
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
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.skipped = state["step"], state["skipped"]
        set_random_states(state["random"], self.device)

    def _log(self, log: RunLog, meter: _Meter) -> None:
        values = meter.values(self.config.train.batch_size)
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        values["memory_gb"] = peak_memory_gb(self.device)
        values["skipped_steps"] = self.skipped
        log.scalars(self.step, values)
        log.skipped_files(self.step, self.dataset.skipped)

    def _sample(self, log: RunLog) -> None:
        config = self.config.sample
        classes = [i % self.config.model.num_classes for i in range(config.columns)]
        try:
            pictures = sample_rows(self.ema.model, self.config, classes, self.device)
            rows = [self.dataset.decode(x) for x in pictures]
        except ValueError as error:
            log.note(f"no sample grid: {error}")
            return
        grid = image_grid(rows, config.steps)
        folder = self.run / "samples"
        folder.mkdir(exist_ok=True)
        grid.save(folder / f"{self.step:08d}.png")
        log.picture(self.step, "samples", pixels_of(grid))


class _Meter:
    """Means and speed of the steps since the last record."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.seconds = 0.0
        self.resume()

    def resume(self) -> None:
        """What happened since the last `add` (sampling, saving) does not count as training time."""
        self._since = time.perf_counter()

    def add(self, values: dict[str, float]) -> None:
        self.steps.append(values)
        self.seconds += time.perf_counter() - self._since
        self.resume()

    def values(self, batch_size: int) -> dict[str, float]:
        """Means over the steps that were not skipped (nan if none), and the speed over all."""
        rate = len(self.steps) / self.seconds
        taken = [v for v in self.steps if all(map(math.isfinite, v.values()))]
        means = {
            name: sum(v[name] for v in taken) / len(taken) if taken else math.nan
            for name in self.steps[0]
        }
        return {**means, "steps_per_second": rate, "images_per_second": rate * batch_size}


def learning_rate(step: int, train: TrainConfig) -> float:
    """Rate of step `step` (from 0): linear warm-up to `lr`, then constant or cosine to zero."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    return train.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def sample_rows(
    model: TiM, config: RunConfig, classes: list[int], device: torch.device
) -> list[Tensor]:
    """Samples [len(classes), C, H, W] for each entry of `sample.steps`, all from the same noise."""
    settings = config.sample
    y = torch.tensor(classes, device=device)
    shape = (len(classes), config.model.in_channels, *[config.model.input_size] * 2)
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
            null=model.null_condition(len(classes)),
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
    classes = max(model.num_classes or 0, dataset.num_classes)
    if data.path is not None:
        data = dataclasses.replace(data, path=str(Path(data.path).absolute()))
    model = dataclasses.replace(model, num_classes=classes)
    return dataclasses.replace(config, model=model, data=data)


def _seed(*numbers: int) -> int:
    """A 63-bit seed that differs for different tuples."""
    state: Any = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(state[0]) >> 1
