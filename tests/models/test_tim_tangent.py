"""The derivative of the whole network along (x, t): exact, never silently zero, without graph."""

import dataclasses
import typing

import pytest
import torch
from networks import KINDS, LABELS, arguments, network
from torch.profiler import ProfilerActivity, profile

from golden_files import relative_error
from tim import ops
from tim.models import TiM, TiMConfig
from tim.models.config import Condition

EACH_KIND = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


def jvp(model: TiM, inputs: tuple, v: torch.Tensor, **kwargs) -> tuple:
    """F and dF/dt along the path: tangents v of x and 1 of t; r and the condition held."""
    x, t, r, y = inputs
    return torch.func.jvp(lambda x, t: model(x, t, r, y, **kwargs), (x, t), (v, torch.ones_like(t)))


def velocity(config: TiMConfig, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return arguments(config, dtype, seed=7)[0]


def exact(config: TiMConfig, rounded_to: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 result for weights and inputs rounded to `rounded_to` first."""
    model = network(config, rounded_to).double()
    inputs = [i.double() if i.is_floating_point() else i for i in arguments(config, rounded_to)]
    with ops.reference_only():
        return jvp(model, tuple(inputs), velocity(config, rounded_to).double())


@EACH_KIND
@pytest.mark.parametrize("condition", typing.get_args(Condition))
@pytest.mark.parametrize("own_embedder", [True, False])
def test_equals_the_central_difference(config, condition, own_embedder):
    config = dataclasses.replace(config, new_condition=condition, use_new_embed=own_embedder)
    model = network(config, torch.float64)
    x, t, r, y = arguments(config, torch.float64)
    v = velocity(config)
    out, tangent = jvp(model, (x, t, r, y), v)

    def difference(step):
        with torch.no_grad():
            ahead, behind = (model(x + s * v, t + s, r, y) for s in (step, -step))
        return (ahead - behind) / (2 * step)

    # Two steps cancel the error of second order: what is left is rounding.
    expected = (4 * difference(1e-4) - difference(2e-4)) / 3
    assert torch.equal(out, model(x, t, r, y))
    assert expected.norm() > 0.1 * out.norm()
    assert relative_error(tangent, expected) < 1e-9


@EACH_KIND
@pytest.mark.parametrize("part", ["x", "t"])
def test_one_tangent_alone(config, part):
    model = network(config, torch.float64)
    x, t, r, y = arguments(config, torch.float64)
    v = velocity(config)
    if part == "x":
        _, tangent = torch.func.jvp(lambda x: model(x, t, r, y), (x,), (v,))
        rest = torch.func.jvp(lambda t: model(x, t, r, y), (t,), (torch.ones_like(t),))[1]
    else:
        _, tangent = torch.func.jvp(lambda t: model(x, t, r, y), (t,), (torch.ones_like(t),))
        rest = torch.func.jvp(lambda x: model(x, t, r, y), (x,), (v,))[1]
    assert tangent.abs().max() > 0
    torch.testing.assert_close(tangent + rest, jvp(model, (x, t, r, y), v)[1])


@EACH_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_as_accurate_as_the_references(config, dtype):
    model, inputs, v = network(config, dtype), arguments(config, dtype), velocity(config, dtype)
    wanted = exact(config, dtype)
    with ops.reference_only():
        yardstick = jvp(model, inputs, v)
    for actual, reference, target, factor in zip(
        jvp(model, inputs, v), yardstick, wanted, (2, 3), strict=True
    ):
        assert actual.dtype == dtype
        allowed = factor * relative_error(reference, target) + 4 * torch.finfo(dtype).eps
        assert relative_error(actual, target) < allowed < 0.2


@EACH_KIND
def test_autocast(config):
    model, inputs, v = network(config), arguments(config), velocity(config, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, tangent = jvp(model, inputs, v)
    assert relative_error(tangent, exact(config, torch.float32)[1]) < 0.05


@EACH_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_no_graph(config, dtype):
    (out, features), (t_out, t_features) = jvp(
        network(config, dtype), arguments(config, dtype), velocity(config, dtype),
        return_features=True,
    )  # fmt: skip
    assert out.requires_grad
    assert features.requires_grad
    assert not t_out.requires_grad
    assert not t_features.requires_grad


@EACH_KIND
@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_through_the_value_is_that_of_the_plain_pass(config, checkpointing):
    model, inputs = network(config), arguments(config)
    used = [p for name, p in model.named_parameters() if not name.startswith("projector")]
    plain = torch.autograd.grad(model(*inputs).square().mean(), used)
    model.gradient_checkpointing = checkpointing
    out, _ = jvp(model, inputs, velocity(config, torch.float32))
    beside = torch.autograd.grad(out.square().mean(), used)
    # As one vector: a bias of all keys, for one, has no effect, so its own gradient is rounding.
    assert relative_error(*(torch.cat([g.flatten() for g in gs]) for gs in (beside, plain))) < 1e-5


@EACH_KIND
@pytest.mark.parametrize("features", [False, True])
def test_a_tangent_stores_nothing_for_the_backward(config, features):
    model, inputs, v = network(config), arguments(config), velocity(config, torch.float32)

    def retained(run) -> tuple[int, object]:
        """Bytes allocated by `run` and still held while its outputs live."""
        run()  # fills caches
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            outputs = run()
        return sum(event.self_cpu_memory_usage for event in profiler.key_averages()), outputs

    plain, _ = retained(lambda: model(*inputs, return_features=features))
    dual, (_, tangents) = retained(lambda: jvp(model, inputs, v, return_features=features))
    own = sum(tangent.nbytes for tangent in (tangents if features else (tangents,)))
    assert plain > 10 * own
    assert dual <= plain + own


@EACH_KIND
def test_without_gradient(config):
    model, inputs, v = network(config), arguments(config), velocity(config, torch.float32)
    expected = jvp(model, inputs, v)
    with torch.no_grad():
        actual = jvp(model, inputs, v)
    torch.testing.assert_close(actual, expected)


@EACH_KIND
def test_empty_batch(config):
    config = dataclasses.replace(config, depth=1, encoder_depth=1)
    inputs = tuple(tensor[:0] for tensor in arguments(config))
    for out in jvp(network(config), inputs, inputs[0]):
        assert out.shape == inputs[0].shape


@EACH_KIND
def test_compiled_with_its_derivative(config):
    config = dataclasses.replace(config, depth=1, encoder_depth=1)
    model, inputs, v = network(config), arguments(config), velocity(config, torch.float32)
    compiled = torch.compile(lambda v: jvp(model, inputs, v), backend="aot_eager", fullgraph=True)
    assert_same_derivative(compiled(v), jvp(model, inputs, v))


def test_derivative_of_a_compiled_network():
    """PyTorch runs it uncompiled, since it has no rule for it; what counts is that it is right.

    Not so with its debugging backend "eager", which hands dual numbers to compiled code: there
    tangents are lost, the one mode that PyTorch leaves no way to catch.
    """
    config = dataclasses.replace(LABELS, depth=1, encoder_depth=1)
    model, inputs, v = network(config), arguments(config), velocity(config, torch.float32)
    compiled = torch.compile(model, backend="aot_eager")
    assert_same_derivative(jvp(compiled, inputs, v), jvp(model, inputs, v))


def assert_same_derivative(actual: tuple, expected: tuple) -> None:
    assert expected[1].abs().max() > 0
    for one, two in zip(actual, expected, strict=True):
        assert relative_error(one, two) < 1e-5
