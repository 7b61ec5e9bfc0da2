"""What we compare ourselves with does the same work: same network, same loss, same gradient."""

import sys
from pathlib import Path

import pytest
import torch

from tim.bench.step import Setup, StepSize
from tim.models import TiMConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from peers import PlainTiM, PublicStep, networks, public_objective, steps

CONFIGS = {
    "plain": TiMConfig(
        input_size=8, hidden_size=48, depth=3, num_heads=2, num_classes=10,
        use_new_embed=False, distance_aware=False,
    ),
    "all": TiMConfig(
        input_size=8, hidden_size=48, depth=2, num_heads=3, num_classes=10, lora_hidden_size=16,
        use_new_embed=True, distance_aware=True,
    ),
}  # fmt: skip


@pytest.fixture(params=CONFIGS)
def setup(request) -> Setup:
    size = StepSize("test", CONFIGS[request.param], 10)
    return Setup.random(size, torch.float32, torch.device("cpu"))


def test_the_peer_is_the_same_network(setup) -> None:
    plain = PlainTiM(setup.model.config)
    plain.load_state_dict(setup.model.state_dict(), strict=True)
    x = torch.randn(10, 4, 8, 8)
    inputs = (x, setup.t, setup.r, setup.y)
    expected = setup.model(*inputs)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(plain(*inputs), expected, rtol=1e-4, atol=1e-5)


def test_the_peer_samples_in_bfloat16(setup) -> None:
    inputs = (torch.randn(10, 4, 8, 8), setup.t, setup.r, setup.y)
    exact = setup.model(*inputs)
    plain = networks(setup, False)["public"].to(torch.bfloat16)
    out = plain(inputs[0].bfloat16(), *inputs[1:])
    assert out.dtype == torch.bfloat16
    # As far from float32 as our own network in that dtype, within a factor.
    own = setup.model.to(torch.bfloat16)(*inputs)
    error, rounding = ((x.float() - exact).norm() for x in (out, own))
    assert 0 < error < 3 * rounding


@pytest.mark.parametrize("kind", ["dde", "jvp"])
def test_the_peer_takes_the_same_step(setup, kind) -> None:
    plain = PlainTiM(setup.model.config)
    plain.load_state_dict(setup.model.state_dict())
    loss, derivative = public_objective(plain, setup, kind)
    out = setup.loss(kind)(setup.model, *setup.batch)
    # A float32 difference over 0.01 has lost two digits, on both sides.
    rounding = 1e-2 if kind == "dde" else 1e-4
    torch.testing.assert_close(derivative, out.derivative, rtol=rounding, atol=rounding)
    torch.testing.assert_close(loss, out.loss, rtol=1e-3, atol=1e-4)
    assert derivative[:5].abs().max() == 0
    assert derivative[5:].abs().max() > 0
    loss.backward()
    out.loss.backward()
    ours = dict(setup.model.named_parameters())
    for name, parameter in plain.named_parameters():
        expected = ours[name].grad
        error = (parameter.grad - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error < 2e-3, name


def test_whole_steps_of_the_peers_change_what_ours_change(setup) -> None:
    public = PublicStep(setup)
    step = setup.training_step()
    step.lr.fill_(1e-2)
    public.optimizer.param_groups[0].update(lr=1e-2, betas=(0.9, 0.95), eps=1e-6)
    step.run()
    public.take(public.model, "jvp")
    ours = dict(setup.model.named_parameters())
    averages = dict(step.ema.model.named_parameters())
    for name, parameter in public.model.named_parameters():
        torch.testing.assert_close(parameter, ours[name], rtol=1e-3, atol=1e-3)
    for name, parameter in public.average.named_parameters():
        torch.testing.assert_close(parameter, averages[name], rtol=1e-4, atol=1e-6)


def test_peers_are_compiled_only_when_asked(setup) -> None:
    eager = ["public dde", "public jvp"]
    assert list(steps(setup, False)) == eager
    assert list(steps(setup, True)) == [*eager, "public dde, compiled"]
    assert list(networks(setup, False)) == ["public"]
    assert list(networks(setup, True)) == ["public", "public, compiled"]
