"""One training step, in two halves: `load` for the host, `run` for the device.

`load` brings a batch to the device, draws everything random of the step and sets the learning
rate. `run` is forward pass, derivative, loss, backward pass, clipping, optimizer and averaging. It
reads no tensor back, so the host never waits in it; a step that is not finite is skipped on the
device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from tim import images
from tim.config import RunConfig, TrainConfig
from tim.data import Batch
from tim.ema import EMA, ema_weight
from tim.graphs import Replayed, copied_into
from tim.images import Images
from tim.models import TiM
from tim.objective import TransitionLoss
from tim.parallel import Spread, World
from tim.text import TextEncoder

#: What `TrainingStep.run` returns, in this order.
VALUES = ("loss", "denoising", "projection", "grad_norm")
#: Parts of a step, as profiles name them.
PHASES = ("forward and derivative", "backward", "norm", "optimizer", "average")

WHOLE = "step"
#: DDP: what is left of a backward pass when all gradients are there but not yet added up over the
#: ranks. FSDP2: its collectives, which lie in the other parts or, on a GPU, beside them.
COMMUNICATION = "communication"


class Inputs(NamedTuple):
    """What one part of a step works on, all on the device."""

    x: Images
    z: Images
    y: Tensor  #: labels or features of captions, some of them dropped
    y_guidance: Tensor  #: labels or features as they were
    null: Tensor  #: null labels, or features of the empty caption
    t: Tensor
    r: Tensor
    features: Images | None


class TrainingStep:
    """Steps of AdamW on `model`, with the averages `ema` behind them.

    `encoder(x, y)` gives the features for the projection loss where a batch has none; `text`
    encodes the captions of a text model. `spread` tells how the model lives on several ranks, of
    which each gets its share of every batch. `mark` is told which part of the step begins, of
    `PHASES`; `WHOLE` of a step that is one CUDA graph; `COMMUNICATION` where DDP waits.
    """

    def __init__(
        self,
        model: TiM,
        ema: EMA,
        loss: TransitionLoss,
        config: RunConfig,
        encoder: Callable[[Tensor, Tensor], Tensor] | None = None,
        text: TextEncoder | None = None,
        spread: Spread | None = None,
        mark: Callable[[str], None] = lambda phase: None,
    ):
        self.model, self.ema, self.loss, self.encoder = model, ema, loss, encoder
        self.text, self.mark = text, mark
        self.config = config
        self.parameters = list(model.parameters())
        self.device = self.parameters[0].device
        self.spread = spread or Spread(World(self.device))
        self.spread.waiting = lambda: self.mark(COMMUNICATION)
        train = config.train
        #: Images of a step, on average.
        self.images = float(train.batch_size)
        # On the device, where the host can set them for a step while earlier steps still run.
        self.lr, self.ema_weight = torch.zeros(2, device=self.device).unbind()
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self.lr,
            betas=(train.beta1, train.beta2),
            eps=train.adam_eps,
            weight_decay=train.weight_decay,
            fused=True,
            capturable=train.cuda_graph,
        )
        self.inputs: list[Inputs] | None = None
        #: Whether inputs are copied to where the first ones are.
        self.static = train.cuda_graph
        self._run = self._steps
        if train.cuda_graph:
            self._run = Replayed(self._steps, self.device, "train.cuda_graph")

    def load(self, batch: Batch, step: int) -> None:
        """Prepare step number `step` (from 0) on a batch of `train.batch_size` images (fewer with
        `data.token_budget`).

        Of several ranks each gets its own images: of every part those that `Spread.mine` takes.
        """
        train = self.config.train
        self.lr.fill_(learning_rate(step, train))
        self.ema_weight.fill_(
            ema_weight(
                (step + 1) * self.images,
                self.images,
                decay=train.ema_decay,
                halflife_images=train.ema_halflife_images,
                rampup=train.ema_rampup,
            )
        )
        size = len(batch.y) // train.accumulate
        parts = [slice(part * size, (part + 1) * size) for part in range(train.accumulate)]
        pieces = [Batch(*(None if v is None else v[rows] for v in batch)) for rows in parts]
        inputs = [self._draw(piece, step, part) for part, piece in enumerate(pieces)]
        self.inputs = copied_into(self.inputs, inputs) if self.static else inputs

    def run(self) -> Tensor:
        """Take the step; returns its `VALUES` [4] on the device.

        The loss is the mean over the whole batch, whatever `train.accumulate`. When one of the
        values is not finite, neither the weights, nor their averages, nor the optimizer's state
        change.
        """
        if self.static:
            self.mark(WHOLE)
        return self._run()

    def _steps(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        parts = []
        for inputs in self.inputs:
            with self.spread.part(last=inputs is self.inputs[-1]):
                parts.append(self._backward(inputs))
        with self._phase(PHASES[2]):
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            norm = self.spread.total_norm(gradients)
            values = self._values(parts, norm)
            # Infinity times zero is not zero.
            skip = (values * 0).sum().ne_(0).float()
            clip = self.config.train.clip_norm
            scale = (norm / clip).clamp(min=1) if clip > 0 else None
        with self._phase(PHASES[3]):
            # The names under which torch.amp's gradient scaler talks to fused optimizers: gradients
            # are divided by the one, and a step for which the other is 1 changes nothing. So
            # clipping and skipping are part of the optimizer's one pass over the weights.
            self.optimizer.grad_scale, self.optimizer.found_inf = scale, skip
            self.optimizer.step()
        with self._phase(PHASES[4]):
            self.ema.update(self.model, self.ema_weight, skip)
        return values

    def _values(self, parts: list[tuple[Tensor, ...]], norm: Tensor) -> Tensor:
        """`VALUES`: means over parts and ranks of what `_backward` returned, and the norm."""
        if len(parts) == 1 and self.spread.world.size == 1:
            return torch.stack([*parts[0], norm])
        means = torch.stack([torch.stack(part) for part in parts]).mean(0)
        return torch.cat([self.spread.mean(means), norm.view(1)])

    def _draw(self, piece: Batch, step: int, part: int) -> Inputs:
        # All draws of this part follow from this seed.
        seed = (self.config.train.seed, step, part)
        torch.manual_seed(_seed(*seed))
        x, features = (None if v is None else self._to_device(v) for v in (piece.x, piece.features))
        y, null = self._conditions(piece.y)
        if features is None and self.encoder is not None:
            with torch.no_grad():
                features = self.encoder(x, y)
        # Drawn for the images of all ranks, so that it does not matter how many they are. Not
        # randn_like, which draws in the order of x's strides.
        batch, packed = len(y) * self.spread.world.size, images.is_packed(x)
        if packed:
            z = self._packed_noise(x, batch, seed)
        else:
            z = torch.randn((batch, *x.shape[1:]), dtype=x.dtype, device=x.device)
        dropped = torch.rand(batch, device=self.device) < self.config.model.class_dropout_prob
        if packed:
            times = self.loss.draw_unshifted(batch, x[0].dtype, x[0].device)
            dropped, *times = map(self.spread.mine, (dropped, *times))
            t, r = self.loss.shift_times(x, *times)
        else:
            z, dropped, t, r = map(self.spread.mine, (z, dropped, *self.loss.draw_times(z)))
        dropped = dropped.view(-1, *[1] * (y.dim() - 1))
        return Inputs(x, z, torch.where(dropped, null, y), y, null, t, r, features)

    def _packed_noise(self, x: list[Tensor], batch: int, seed: tuple[int, ...]) -> list[Tensor]:
        """Noise of each image from a seed of its own: the sizes of other ranks' are not known."""
        noise = []
        for image, number in zip(x, self.spread.mine(torch.arange(batch)).tolist(), strict=True):
            generator = torch.Generator(image.device).manual_seed(_seed(*seed, number))
            options = {"dtype": image.dtype, "device": image.device, "generator": generator}
            noise.append(torch.randn(image.shape, **options))
        return noise

    def _conditions(self, y: Tensor | list[str]) -> tuple[Tensor, Tensor]:
        """Labels, or features of captions, and their null condition."""
        if self.text is None:
            y = self._to_device(y)
            return y, self.model.null_condition(len(y))
        if self.static:
            # Inputs of a recorded step are of one size.
            return self.text.with_null(y, self.text.max_tokens)
        # Padding is not masked, so captions are padded as if all ranks' were in one batch.
        (longest,) = self.spread.world.largest(self.text.longest(y))
        return self.text.with_null(y, int(longest))

    def _to_device(self, tensor: Images) -> Images:
        if images.is_packed(tensor):
            return [self._to_device(image) for image in tensor]
        if self.device.type != "cuda" or tensor.is_cuda:
            return tensor.to(self.device)
        # A copy from pageable memory waits for all that the device has still to do.
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _backward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Add the gradient of one part; returns its loss, denoising error and projection loss."""
        config = self.config
        bf16 = config.train.precision == "bf16"
        batch = len(inputs.y) * self.spread.world.size
        with (
            self._phase(PHASES[0]),
            torch.autocast(self.device.type, torch.bfloat16, enabled=bf16),
        ):
            out = self.spread.evaluate(
                self.loss,
                self.model,
                inputs.x,
                inputs.z,
                inputs.y,
                t=inputs.t,
                r=inputs.r,
                null=inputs.null,
                y_guidance=inputs.y_guidance,
                ema_model=self.ema.model if config.objective.guidance.enabled else None,
                features=inputs.features,
                diffusion=self.spread.count(round(config.objective.diffusion_ratio * batch)),
            )
            total = out.loss
            if inputs.features is not None:
                total = total + config.objective.projection_weight * out.projection
        with self._phase(PHASES[1]):
            total.backward(torch.full_like(total, 1 / config.train.accumulate))
        return total.detach(), out.denoising.mean().detach(), out.projection.detach()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        if not self.static:
            self.mark(name)
        with record_function(name):
            yield


def learning_rate(step: int, train: TrainConfig) -> float:
    """Rate of step `step` (from 0): linear warm-up to `lr`, then constant or cosine to zero."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    return train.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _seed(*numbers: int) -> int:
    """A 63-bit seed that differs for different tuples."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(state[0]) >> 1
