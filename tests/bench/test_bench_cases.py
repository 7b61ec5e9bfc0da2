"""What the benchmarks count as bytes and FLOPs, and that they compute what they claim to."""

import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

from tim import ops
from tim.bench.cases import ATTENTION_SIZES, DIRECTIONS, OPERATIONS, SIZES, Size, operations_of
from tim.bench.problem import Problem, as_tuple, relative_error

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")
TINY = Size("tiny", 2, 6, 3, 8, 40, (4, 5, 5), 4)
BY_NAME = {operation.name: operation for operation in OPERATIONS}


def problem(name: str, direction: str, dtype: torch.dtype = torch.float32) -> Problem:
    return Problem.random(BY_NAME[name], TINY, dtype, direction, CPU)


def test_every_operation_is_measured_and_has_a_script() -> None:
    measured = {operation.kernel for operation in OPERATIONS}
    assert measured == set(ops.KERNEL_OPS)
    for kernel in measured:
        assert operations_of(kernel)
        assert (SCRIPTS / f"bench_{kernel}.py").is_file()


#: bench_data.py is no benchmark of `tim bench`: its sizes are those of its data.
OF_TIM_BENCH = sorted(set(SCRIPTS.glob("bench_*.py")) - {SCRIPTS / "bench_data.py"})


@pytest.mark.parametrize("script", OF_TIM_BENCH, ids=lambda path: path.stem)
def test_scripts_run_their_own_benchmark(script, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    one = script.stem == "bench_launches"
    option, message = ("--size", "must be one of") if one else ("--sizes", "must be among")
    monkeypatch.setattr(sys, "argv", [script.name, option, "no such size"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 2
    known = capsys.readouterr().err
    assert f"{option} {message}" in known
    networks = ("step", "sampling", "launches", "derivative", "training")
    assert ("digits" in known) == (script.stem.removeprefix("bench_") in networks)
    assert ("tokens-4096" in known) == (script.stem == "bench_derivative")


def test_an_unknown_operation_is_named() -> None:
    with pytest.raises(ValueError, match=r"operation must be one of .*swiglu.*, got 'softmax'"):
        operations_of("softmax")


def test_sizes_are_told_apart_and_those_of_the_models() -> None:
    for sizes in (SIZES["cpu"], SIZES["cuda"] + ATTENTION_SIZES["cuda"]):
        assert len({size.name for size in sizes}) == len(sizes)
    for device in ("cpu", "cuda"):
        xl = next(size for size in SIZES[device] if size.name == "xl2-256")
        assert (xl.tokens, xl.heads, xl.head_dim, xl.hidden, xl.mlp) == (256, 16, 72, 1152, 3072)
    assert {size.head_dim for size in ATTENTION_SIZES["cuda"]} == {64, 72, 128}


def test_a_gpu_measures_the_batch_of_training_and_images_of_1024_pixels() -> None:
    by_name = {size.name: size for size in SIZES["cuda"]}
    assert by_name["xl2-256"].batch == by_name["xl2-256"].images == 128
    xl1 = by_name["xl1-1024"]
    # An autoencoder of factor 32 with 32 channels, patches of one latent.
    assert xl1.latents == (32, 1024 // 32, 1024 // 32)
    assert (xl1.tokens, xl1.heads, xl1.head_dim, xl1.hidden) == (1024, 16, 72, 1152)
    for operation in OPERATIONS:
        small = [size.name for size in operation.sizes("cuda") if size.images == 16]
        objective = operation.kernel in ("interpolate", "transition_loss")
        assert small == (["xl2-256 x 16", "xl1-1024 x 16"] if objective else [])


def test_traffic_reads_and_writes_everything_once() -> None:
    cells, tokens, hidden = 2 * 6 * 40, 2 * 6 * 24, 2 * 24
    assert problem("swiglu", "forward").traffic_bytes() == 4 * 3 * cells
    assert problem("swiglu", "forward", torch.bfloat16).traffic_bytes() == 2 * 3 * cells
    assert problem("swiglu", "backward").traffic_bytes() == 4 * 5 * cells
    assert problem("swiglu", "tangent").traffic_bytes() == 4 * 6 * cells
    assert problem("adaln", "forward").traffic_bytes() == 4 * (2 * tokens + 2 * hidden)
    # x, y and both gradients of outputs come in, gradients of x and y go out, as do three rows
    expected = 4 * (6 * tokens + 6 * hidden)
    assert problem("gated_adaln", "backward").traffic_bytes() == expected


def test_traffic_of_qk_norm_rope_and_the_loss_leaves_out_what_backward_does_not_need() -> None:
    tables, qkv = 4 * 8 + 2 * 6 * 8, 2 * 6 * 3 * 24
    assert problem("qk_norm_rope", "forward").traffic_bytes() == 4 * (2 * qkv + tables)
    read, written = 2 * qkv // 3 + tables + qkv, qkv + 4 * 8
    assert problem("qk_norm_rope", "backward").traffic_bytes() == 4 * (read + written)
    image = 4 * 4 * 5 * 5
    # prediction and target in, gradient out, and the gradient of the loss of each sample
    assert problem("transition_loss", "backward").traffic_bytes() == 4 * (3 * image + 4)
    # under autocast: prediction and derivative in bf16, data and target in float32
    half = problem("transition_loss", "forward", torch.bfloat16).traffic_bytes()
    assert half == 2 * (image + image // 2) + 4 * (3 * image + 4 * 5 + 4 + 3 * 4)


def test_flops_of_attention() -> None:
    flops = BY_NAME["attention"].flops(TINY)
    product = 2 * 2 * 3 * 6 * 6 * 8
    assert flops == {"forward": 2 * product, "backward": 5 * product, "tangent": 6 * product}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_direction_computes_what_it_times(operation) -> None:
    assert operation.directions[0] == "forward"
    for direction in operation.directions:
        tiny = Problem.random(operation, TINY, torch.float32, direction, CPU)
        exact = tiny.exact()
        for function in (operation.op, operation.reference):
            results = tiny.call(function)()
            assert len(results) == len(exact)
            assert relative_error(results, exact) < 1e-4
            assert all(result.abs().max() > 0 for result in results)


def test_directions_are_forward_gradient_and_tangent() -> None:
    gate, up = problem("swiglu", "forward").inputs
    assert torch.equal(problem("swiglu", "forward").call(ops.swiglu)()[0], ops.swiglu(gate, up))

    tangent = problem("swiglu", "tangent")
    expected = torch.func.jvp(ops.swiglu_reference, tuple(tangent.inputs), tuple(tangent.tangents))
    for actual, exact in zip(tangent.call(ops.swiglu)(), expected, strict=True):
        torch.testing.assert_close(actual, exact)

    backward = problem("swiglu", "backward")
    gradient_gate, gradient_up = backward.call(ops.swiglu)()
    incoming = gradient_up / torch.nn.functional.silu(gate)
    leaf = gate.clone().requires_grad_()
    (expected,) = torch.autograd.grad(ops.swiglu_reference(leaf, up), leaf, incoming)
    torch.testing.assert_close(gradient_gate, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_compiled_reference_gives_the_same(direction, monkeypatch) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: compile_(f, backend="aot_eager"))
    torch._dynamo.reset()
    tiny = problem("gated_adaln", direction)
    with torch.set_grad_enabled(direction == "backward"):
        call = tiny.call(tiny.compile_reference(), compiled=True)
        call()
        assert relative_error(call(), tiny.exact()) < 1e-5


def test_relative_error_is_the_worst_of_all_results() -> None:
    exact = [torch.tensor([3.0, 4.0]).double(), torch.zeros(2).double()]
    actual = [torch.tensor([3.0, 4.5]), torch.zeros(2)]
    assert relative_error(actual, exact) == pytest.approx(0.1)


def test_relative_error_lets_nothing_bad_pass() -> None:
    one = [torch.ones(2).double()]
    assert relative_error([None], one) == math.inf
    assert relative_error([torch.tensor([1.0, math.nan])], one) == math.inf
    two = [torch.ones(1).double(), torch.ones(1).double()]
    assert relative_error([torch.tensor([math.nan]), torch.ones(1)], two) == math.inf
    assert relative_error([torch.ones(2)], [torch.zeros(2).double()]) == math.inf


def test_long_sequences_are_checked_on_one_head() -> None:
    long = next(size for size in ATTENTION_SIZES["cuda"] if size.tokens == 16384)
    assert (long.probe.batch, long.probe.heads) == (1, 1)
    assert (long.probe.tokens, long.probe.head_dim) == (long.tokens, long.head_dim)
    assert TINY.probe == TINY


def test_as_tuple() -> None:
    one = torch.ones(1)
    assert as_tuple(one) == (one,)
    assert as_tuple((one, one)) == (one, one)
