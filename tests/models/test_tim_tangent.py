"""The derivative of the whole network along (x, t): exact, never silently zero, without graph."""

import dataclasses
import typing
from collections.abc import Callable
from contextlib import nullcontext

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
    # Products of values and tangents together have more rows, and may be summed in another order.
    assert relative_error(out, model(x, t, r, y)) < 1e-14
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


def retained(run: Callable[[], object]) -> tuple[int, object]:
    """Bytes allocated by `run` and still held while its outputs live."""
    run()  # fills caches
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        outputs = run()
    return sum(event.self_cpu_memory_usage for event in profiler.key_averages()), outputs


@EACH_KIND
@pytest.mark.parametrize("features", [False, True])
def test_a_tangent_stores_nothing_for_the_backward(config, features):
    model, inputs, v = network(config), arguments(config), velocity(config, torch.float32)
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
    torch._dynamo.reset()  # sizes of earlier tests would make this one's symbolic
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


# --- tangents as an argument


def given(model: TiM, inputs: tuple, v: torch.Tensor, size: int, **kwargs) -> tuple:
    """F and dF of the last `size` samples, by tangents that are handed over."""
    t = inputs[1]
    tangents = (v[len(v) - size :], torch.ones_like(t[len(t) - size :]))
    return model(*inputs, tangents=tangents, **kwargs)


@EACH_KIND
@pytest.mark.parametrize("size", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tangents_of_the_last_samples(config, size, dtype):
    model, inputs, v = network(config, dtype), arguments(config, dtype), velocity(config, dtype)
    out, tangent = given(model, inputs, v, size)
    expected, everywhere = jvp(model, inputs, v)
    assert tangent.shape == (size, *out.shape[1:]) and not tangent.requires_grad
    accuracy = 10 * torch.finfo(dtype).eps
    assert relative_error(out, expected) < accuracy
    if size:
        assert tangent.abs().max() > 0
        assert relative_error(tangent, everywhere[3 - size :]) < 10 * accuracy


@EACH_KIND
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("mode", ["plain", "checkpointed", "autocast", "no_grad"])
def test_tangents_given_leave_value_features_and_gradients_alone(config, mode, kernels):
    model, inputs, v = network(config), arguments(config), velocity(config, torch.float32)
    used = list(model.parameters())
    rounding = 2e-2 if mode == "autocast" else 1e-5

    def run(**tangents) -> tuple:
        with (
            torch.set_grad_enabled(mode != "no_grad"),
            torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"),
        ):
            out, features, *tangent = model(*inputs, return_features=True, **tangents)
        if mode == "no_grad":
            return out, features, *tangent
        loss = out.float().square().mean() + features.float().square().mean()
        gradients = torch.autograd.grad(loss, used)
        return out, features, torch.cat([g.flatten() for g in gradients]), *tangent

    with nullcontext() if kernels else ops.reference_only():
        plain = run()
        model.gradient_checkpointing = mode == "checkpointed"
        *actual, tangent = run(tangents=(v[1:], torch.ones(2)))
    for one, two in zip(actual, plain, strict=True):
        assert relative_error(one, two) < rounding
    assert relative_error(tangent, exact(config, torch.float32)[1][1:]) < 2.5 * rounding


def test_checkpointing_with_tangents_stores_no_activations():
    model, inputs, v = network(LABELS), arguments(LABELS), velocity(LABELS, torch.float32)
    stored = {}
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x
        ):
            given(model, inputs, v, 2)
        stored[checkpointing] = sum(sizes)
    assert stored[True] < stored[False] / 2


@EACH_KIND
@pytest.mark.parametrize("kernels", [True, False])
def test_tangents_given_store_nothing_for_the_backward(config, kernels):
    """Neither operations nor linear layers do: one pass holds what that for F alone holds."""
    model, inputs, v = network(config), arguments(config), velocity(config, torch.float32)
    with nullcontext() if kernels else ops.reference_only():
        plain, out = retained(lambda: model(*inputs))
        dual, (_, tangent) = retained(lambda: given(model, inputs, v, 2))
    assert plain > 10 * out.nbytes
    assert dual <= plain + tangent.nbytes


def test_tangents_given_and_tangents_carried_do_not_mix():
    model, inputs, v = network(LABELS), arguments(LABELS), velocity(LABELS, torch.float32)
    with pytest.raises(NotImplementedError, match="the network with tangents given"):
        torch.func.jvp(lambda x: given(model, (x, *inputs[1:]), v, 2)[0], inputs[:1], (v,))


@pytest.mark.parametrize(
    ("tangents", "message"),
    [
        ((torch.zeros(4, 4, 8, 6), torch.zeros(4)), r"T <= B = 3 .* got \[4, 4, 8, 6\] and \[4\]"),
        ((torch.zeros(2, 4, 8, 6), torch.zeros(3)), r"got \[2, 4, 8, 6\] and \[3\]"),
        ((torch.zeros(2, 4, 8, 8), torch.zeros(2)), r"rest of x, \[3, 4, 8, 6\]"),
    ],
)
def test_tangents_of_other_shapes_are_refused(tangents, message):
    with pytest.raises(ValueError, match=f"tangents must have shapes .*{message}"):
        network(LABELS)(*arguments(LABELS), tangents=tangents)


@EACH_KIND
def test_compiled_with_tangents_given(config):
    config = dataclasses.replace(config, depth=1, encoder_depth=1)
    model, inputs, v = network(config), arguments(config), velocity(config, torch.float32)
    torch._dynamo.reset()  # sizes of earlier tests would make this one's symbolic
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same_derivative(given(compiled, inputs, v, 2), given(model, inputs, v, 2))


def assert_same_derivative(actual: tuple, expected: tuple) -> None:
    assert expected[1].abs().max() > 0
    for one, two in zip(actual, expected, strict=True):
        assert relative_error(one, two) < 1e-5
