"""The training step: exact derivative against finite difference, kernels against references.

Every candidate works on the same weights, images, noise and times, and takes a whole step: forward
pass, derivative, loss, backward pass, clipping, AdamW update (with learning rate 0, so that the
weights stay what they are) and averaging of the weights. The first one is the exact derivative on
kernels, the package's default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from tim import ops, transports
from tim.bench.machine import name_of
from tim.bench.measure import Settings
from tim.bench.memory import peak_bytes
from tim.bench.problem import relative_error
from tim.bench.report import Candidate, Row
from tim.bench.timing import compare
from tim.config import RunConfig, TrainConfig
from tim.ema import EMA
from tim.models import ARCHITECTURES, TiM, TiMConfig
from tim.objective import TransitionLoss
from tim.parallel import World, build_spread
from tim.step import Inputs, TrainingStep

TRANSPORT = transports.get("ot_fm", P_mean=-0.4)


@dataclass(frozen=True)
class StepSize:
    """A model and the batch of one training step."""

    name: str
    config: TiMConfig
    batch: int


def _paper(name: str, batch: int) -> StepSize:
    """Without the projection head, whose loss needs another network's features."""
    return StepSize(name.removeprefix("tim-"), replace(ARCHITECTURES[name], z_dim=None), batch)


STEP_SIZES: dict[str, tuple[StepSize, ...]] = {
    "cpu": (
        StepSize(
            "digits",
            TiMConfig(input_size=8, in_channels=1, hidden_size=96, depth=4, num_heads=4,
                      num_classes=10),
            128,
        ),
        StepSize(
            "small",
            TiMConfig(input_size=16, hidden_size=384, depth=12, num_heads=6, num_classes=10),
            16,
        ),
    ),
    "cuda": (_paper("tim-b4-256", 256), _paper("tim-xl2-256", 32)),
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """What all candidates of a comparison share."""

    model: TiM
    x: Tensor
    z: Tensor
    y: Tensor
    t: Tensor
    r: Tensor
    dtype: torch.dtype  #: float32, or that of autocast

    @classmethod
    def random(cls, size: StepSize, dtype: torch.dtype, device: torch.device) -> Setup:
        """Every weight random: a fresh network is zero, and so is its derivative."""
        torch.manual_seed(0)
        model = TiM(size.config).to(device)
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.02)
        shape = (size.batch, size.config.in_channels, *(2 * [size.config.input_size]))
        x, z = (torch.randn(shape, device=device) for _ in range(2))
        y = torch.randint(size.config.num_classes, (size.batch,), device=device)
        times = [TRANSPORT.sample_t(size.batch, device=device) for _ in range(2)]
        t, r = torch.maximum(*times), torch.minimum(*times)
        r[: size.batch // 2] = t[: size.batch // 2]
        r[size.batch - round(0.1 * size.batch) :] = TRANSPORT.T_min
        return cls(model, x, z, y, t, r, dtype)

    def loss(self, derivative: str) -> TransitionLoss:
        """As the released configurations train, half of the batch with r = t."""
        return TransitionLoss(transport=TRANSPORT, derivative=derivative)

    def autocast(self):
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.x.device.type, self.dtype)

    def training_step(self, derivative: str = "jvp", world: World | None = None) -> TrainingStep:
        """The trainer's step on this batch; its learning rate is 0 until somebody sets it.

        With DDP where `world` has several ranks, each of which has a batch like this one.
        """
        precision = {torch.float32: "float32", torch.bfloat16: "bf16"}.get(self.dtype)
        if precision is None:
            raise ValueError(f"training steps are in float32 or bfloat16, got {self.dtype}")
        world = world or World(self.x.device)
        train = TrainConfig(batch_size=len(self.x) * world.size, precision=precision)
        config = RunConfig(preset="bench", model=self.model.config, train=train)
        ema, loss = EMA(self.model), self.loss(derivative)
        spread = build_spread(config, world, self.model, ema.model, loss, features=False)
        step = TrainingStep(self.model, ema, loss, config, spread=spread)
        null = self.model.null_condition(len(self.y))
        step.inputs = [Inputs(self.x, self.z, self.y, self.y, null, self.t, self.r, None)]
        step.ema_weight.fill_(1e-4)
        return step

    def wide_model(self) -> TiM:
        """The network in float64."""
        model = TiM(self.model.config).to(self.x.device, torch.float64)
        model.load_state_dict(self.model.state_dict())
        return model

    def exact_derivative(self) -> Tensor:
        """dF in float64."""
        model = self.wide_model()
        batch = [v.double() if v.is_floating_point() else v for v in self.batch]
        with torch.no_grad(), ops.reference_only():
            return self.loss("jvp")(model, *batch).derivative

    @property
    def batch(self) -> tuple[Tensor, ...]:
        return self.x, self.z, self.y, self.t, self.r


@dataclass(frozen=True)
class StepCandidate:
    """`objective()` gives loss and time derivative of the network, `take()` takes a whole step."""

    objective: Callable[[], tuple[Tensor, Tensor]]
    take: Callable[[], object]
    context: Callable = nullcontext
    #: Frees what the last step left, which is no part of the next one.
    forget: Callable[[], object] = lambda: None

    def step(self) -> Callable[[], object]:
        def step() -> object:
            with self.context():
                return self.take()

        return step


class Peers(Protocol):
    """Other implementations, by name; the second argument asks for torch.compile of them too."""

    def steps(self, setup: Setup, compiled: bool) -> dict[str, StepCandidate]: ...

    def operators(self, setup: Setup) -> dict[str, Callable[[], Tensor]]: ...

    def networks(self, setup: Setup, compiled: bool) -> dict[str, nn.Module]: ...

    def training(self, setup: Setup, compiled: bool, ranks: int) -> dict[str, StepCandidate]: ...


def kernels_of(device: torch.device) -> str:
    """For the result file: on what a whole network runs."""
    names = [name for name, backends in ops.available().items() if device.type in backends]
    return f"{device.type} kernels of {', '.join(names)}" if names else "PyTorch"


def measure_step(
    size: StepSize, dtype: torch.dtype, settings: Settings, peers: Peers | None = None
) -> Row:
    """Times, peak memory and derivative error of all candidates."""
    setup = Setup.random(size, dtype, settings.device)
    candidates = own_candidates(setup)
    if peers is not None:
        candidates |= peers.steps(setup, settings.compile)
    return measure_candidates("step", size, setup, candidates, settings)


def measure_candidates(
    benchmark: str,
    size: StepSize,
    setup: Setup,
    candidates: dict[str, StepCandidate],
    settings: Settings,
) -> Row:
    """A row of steps; the first candidate has to run, others may be out of memory."""
    device, dtype = settings.device, setup.dtype
    exact = setup.exact_derivative()
    steps: dict[str, Callable[[], object]] = {}
    errors, peaks, notes = {}, {}, []
    for name, candidate in candidates.items():
        try:
            with candidate.context():
                _, derivative = candidate.objective()
            errors[name] = relative_error([derivative.detach()], [exact])
            step = candidate.step()
            step()
            # What the last step left is no part of this one: some free it first, some at the end.
            setup.model.zero_grad(set_to_none=True)
            peaks[name], steps[name] = peak_bytes(step, device), step
        except torch.OutOfMemoryError as error:
            if not steps:
                raise
            notes.append(f"{name}: {str(error).splitlines()[0]}")
    # What a user's step costs includes its launches, so no CUDA graphs.
    functions = {name: [step] for name, step in steps.items()}
    times = compare(functions, device, settings.seconds, graphs=False)
    return Row(
        benchmark=benchmark,
        size=size.name,
        shape={**asdict(size.config), "batch": size.batch},
        dtype=name_of(dtype) + ("" if dtype == torch.float32 else " autocast"),
        direction="step",
        device=device.type,
        runs_on=kernels_of(device),
        candidates={name: Candidate(times[name], peaks[name], errors[name]) for name in steps},
        notes=notes,
    )


def own_candidates(setup: Setup) -> dict[str, StepCandidate]:
    """Both derivatives, on kernels and on the PyTorch references: the trainer's own step."""
    step = setup.training_step()

    def candidate(derivative: str, context: Callable) -> StepCandidate:
        loss = setup.loss(derivative)

        def objective() -> tuple[Tensor, Tensor]:
            with setup.autocast():
                out = loss(setup.model, *setup.batch)
            return out.loss, out.derivative

        def take() -> Tensor:
            step.loss = loss
            return step.run()

        return StepCandidate(objective, take, context)

    return {
        f"{derivative}{suffix}": candidate(derivative, context)
        for derivative in ("jvp", "dde")
        for suffix, context in (("", nullcontext), (", references", ops.reference_only))
    }


def training_candidates(
    size: StepSize, dtype: torch.dtype, world: World, compiled: bool, peers: Peers | None
) -> tuple[dict[str, StepCandidate], Tensor]:
    """Steps as a rank of `world` takes them, each with a model of its own, and dF in float64.

    Kernels and references share one where they are not compiled.
    """
    contexts = {"": nullcontext, ", references": ops.reference_only}
    candidates: dict[str, StepCandidate] = {}
    for derivative in ("jvp", "dde"):
        candidates |= _trained(Setup.random(size, dtype, world.device), derivative, world, contexts)
        for suffix in contexts if compiled else ():
            setup = Setup.random(size, dtype, world.device)
            setup.model.compile(dynamic=False)
            context = {f"{suffix}, compiled": contexts[suffix]}
            candidates |= _trained(setup, derivative, world, context)
    setup = Setup.random(size, dtype, world.device)
    if peers is not None:
        candidates |= peers.training(setup, compiled, world.size)
    return candidates, setup.exact_derivative()


def _trained(
    setup: Setup, derivative: str, world: World, contexts: Mapping[str, Callable]
) -> dict[str, StepCandidate]:
    """The trainer's step of one model, in each of the contexts."""
    step = setup.training_step(derivative, world)

    def objective() -> tuple[Tensor, Tensor]:
        with setup.autocast():
            out = step.loss(setup.model, *setup.batch)
        return out.loss, out.derivative

    return {
        derivative + suffix: StepCandidate(objective, step.run, context, setup.model.zero_grad)
        for suffix, context in contexts.items()
    }
