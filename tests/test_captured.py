"""Whole steps of training and sampling on a GPU: the host reads nothing, a CUDA graph is the same.

With torch, numpy and pytest alone, so that any machine with a GPU can run them. On a CPU the meta
device stands in for it, whose tensors have no values: reading one is an error. For the training
step see test_step.py.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.networks import CAPTIONS, LABELS, arguments, network
from tim import transports
from tim.config import RunConfig, TrainConfig
from tim.ema import EMA
from tim.graphs import WARM_UP
from tim.models import TiM
from tim.objective import TransitionLoss
from tim.sampler import sample
from tim.step import Inputs, TrainingStep

OT_FM = transports.get("ot_fm")
KINDS = {"labels": LABELS, "captions": CAPTIONS}
#: Options of the sampler; `null` is filled in where there is guidance.
WAYS = {
    "plain": {},
    "guided": {"cfg_scale": 2.5, "cfg_interval": (0.1, 0.7)},
    "noisy": {"stochasticity": 0.5},
    "shifted": {"schedule": "shifted", "shift": 2.0},
}
EACH_WAY = pytest.mark.parametrize("way", WAYS)
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


def sampled(model: TiM, device: torch.device | str, way: str, **options) -> Tensor:
    noise, _, _, y = (value.to(device) for value in arguments(model.config))
    if "cfg_scale" in WAYS[way]:
        options["null"] = torch.zeros_like(y)
    if "stochasticity" in WAYS[way]:
        generator = torch.Generator().manual_seed(3)
        shape = (options["steps"] - 2, *noise.shape)
        options["step_noise"] = torch.randn(shape, generator=generator).to(device)
    return sample(model, y, noise, transport=OT_FM, **WAYS[way], **options)


def training_step(model: TiM, *, captured: bool = False, derivative: str = "jvp", **train):
    """A step of training with all its inputs, ready to run."""
    settings = TrainConfig(batch_size=3, cuda_graph=captured, **train)
    config = RunConfig(preset="test", model=model.config, train=settings)
    # One of the three samples has r = t and comes first.
    loss = TransitionLoss(transport=OT_FM, derivative=derivative, diffusion_ratio=1 / 3)
    step = TrainingStep(model, EMA(model), loss, config)
    x, t, r, y = (value.to(step.device) for value in arguments(model.config))
    order = torch.tensor([1, 0, 2], device=step.device)
    t, r, y = t[order], r[order], y[order]
    z = x.flip(0)
    step.inputs = [Inputs(x, z, y, y, torch.zeros_like(y), t, r, None)]
    step.lr.fill_(1e-3)
    step.ema_weight.fill_(0.1)
    return step


class Reading(torch.nn.Module):
    """A network that looks at a value."""

    def __init__(self, model: TiM, read: Callable[[Tensor], object]):
        super().__init__()
        self.model, self.config, self.read = model, model.config, read

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        self.read(x)
        return self.model(x, *others)


READINGS = [
    lambda x: x.sum().item(), lambda x: bool(x.isfinite().all()), lambda x: x.cpu(),
    lambda x: x[x > 0].shape, lambda x: x.tolist(), lambda x: x.double().to("cpu"),
]  # fmt: skip


@EACH_WAY
@EACH_KIND
def test_nothing_in_the_samplers_steps_reads_a_tensor_back(kind, way) -> None:
    out = sampled(network(KINDS[kind]).to("meta"), "meta", way, steps=4)
    assert out.is_meta and out.shape == arguments(KINDS[kind])[0].shape


@pytest.mark.parametrize("read", READINGS)
def test_a_reading_in_a_step_of_the_sampler_is_found(read) -> None:
    model = network(LABELS).to("meta")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        sampled(Reading(model, read), "meta", "plain", steps=2)


# --- on a GPU


def trained(kind: str, device: str, *, captured: bool = False, **options) -> list[Tensor]:
    """Values of every step, and all that the steps have changed, the weights first."""
    step = training_step(network(KINDS[kind]).to(device), captured=captured, **options)
    values = [step.run().clone() for _ in range(WARM_UP + 3)]
    models = [*step.parameters, *step.ema.model.parameters()]
    moments = [v for state in step.optimizer.state.values() for v in state.values()]
    return [*(tensor.detach() for tensor in (*models, *moments)), *values]


OBJECTIVES = {
    "float32": {},
    "bf16": {"precision": "bf16"},
    "dde": {"derivative": "dde", "clip_norm": 0.0},
    "checkpointed": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", OBJECTIVES)
@EACH_KIND
def test_the_steps_that_are_compared_learn(kind, name) -> None:
    after = trained(kind, "cpu", **OBJECTIVES[name])
    # Without features there is no gradient for the projection head.
    for a, (name, b) in zip(after, network(KINDS[kind]).named_parameters(), strict=False):
        assert torch.equal(a, b) == name.startswith("projector"), name
    assert all(tensor.isfinite().all() for tensor in after)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OBJECTIVES)
@EACH_KIND
def test_a_captured_training_step_is_the_uncaptured_one(kind, name) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    plain, captured = (
        trained(kind, "cuda", captured=captured, **OBJECTIVES[name]) for captured in (False, True)
    )
    for a, b in zip(captured, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@EACH_WAY
@EACH_KIND
def test_captured_steps_of_the_sampler_are_the_uncaptured_ones(kind, way) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    model = network(KINDS[kind]).cuda()
    expected = sampled(model, "cuda", way, steps=WARM_UP + 4)
    for _ in range(2):  # the second time from graphs that are there
        actual = sampled(model, "cuda", way, steps=WARM_UP + 4, cuda_graph=True)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_nothing_in_a_training_step_waits_for_the_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    step = training_step(network(LABELS).cuda())
    step.run()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
