"""The peers of attention: each computes the same thing, and stands in the row that is written."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tim import ops
from tim.bench import cases, main
from tim.bench.cases import Size, operations_of
from tim.bench.problem import Problem, relative_error

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")
TINY = Size("tiny", 2, 6, 3, 8, 40, (4, 5, 5), 4)
(ATTENTION,) = operations_of("attention")


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import attention_peers

    return attention_peers


@pytest.mark.parametrize("direction", ATTENTION.directions)
def test_every_peer_computes_attention(direction, peers) -> None:
    problem = Problem.random(ATTENTION, TINY, torch.float32, direction, CPU)
    exact = problem.exact()
    rivals = peers.rivals("attention", direction, CPU)
    assert len(rivals) == 3
    for name, function in rivals.items():
        with torch.set_grad_enabled(direction == "backward"):
            results = problem.call(function)()
        assert relative_error(results, exact) < 1e-5, name
        assert all(result.abs().max() > 0 for result in results), name
    assert peers.rivals("swiglu", direction, CPU) == {}


@pytest.mark.parametrize("head_dim", [8, 72, 128])
def test_head_dimensions_are_padded_for_triton(head_dim, peers, monkeypatch) -> None:
    widths = []

    def fwd_dual(q, k, v, sm_scale):
        widths.append(q.shape[-1])
        operands = (x.transpose(1, 2) for x in (q, k, v))
        return ops.attention_reference(*operands, sm_scale).transpose(1, 2)

    module = SimpleNamespace(JVPAttn=SimpleNamespace(fwd_dual=fwd_dual))
    monkeypatch.setitem(sys.modules, "jvp_flash_attention.jvp_attention", module)
    monkeypatch.setitem(sys.modules, "jvp_flash_attention", SimpleNamespace(jvp_attention=module))
    size = Size("one", 1, 5, 2, head_dim, 0, (0, 0, 0), 0)
    problem = Problem.random(ATTENTION, size, torch.float32, "tangent", CPU)
    results = problem.call(peers.by_jvp_flash_attention)()
    assert relative_error(results, problem.exact()) < 1e-5
    assert widths == [{8: 16, 72: 128, 128: 128}[head_dim]]


@pytest.mark.parametrize(("head_dim", "width"), [(8, 16), (72, 128), (64, 64)])
def test_the_kernel_of_rcm_gets_values_and_tangents(head_dim, width, peers, monkeypatch) -> None:
    def attention(q, k, v, t_q, t_k, t_v, causal, scale):
        assert q.shape[-1] == width and q.stride() == t_q.stride() and causal is False
        weights = (scale * q @ k.mT).softmax(-1)
        t_scores = scale * (t_q @ k.mT + q @ t_k.mT)
        product = weights * t_scores
        out = weights @ v
        return out, product @ v - product.sum(-1, keepdim=True) * out + weights @ t_v

    monkeypatch.setitem(sys.modules, peers.RCM, SimpleNamespace(attention=attention))
    size = Size("one", 1, 5, 2, head_dim, 0, (0, 0, 0), 0)
    problem = Problem.random(ATTENTION, size, torch.float32, "tangent", CPU)
    assert relative_error(problem.call(peers.by_rcm)(), problem.exact()) < 1e-5


@pytest.mark.parametrize("direction", ATTENTION.directions)
def test_a_gpu_times_our_own_forward_too(direction, peers, monkeypatch) -> None:
    """There the row's own candidate takes PyTorch's forward pass, so it is no rival."""
    monkeypatch.setattr(peers, "hopper_there", lambda device: True)
    monkeypatch.setattr(peers, "flash_attn", lambda: None)
    assert peers.FASTEST_FORWARD["cuda"] == "sdpa"
    rivals = peers.rivals("attention", direction, torch.device("cuda"))
    ours = {"tim, kernel", "tim, hopper"}
    if direction == "tangent":
        ours.add("tim, hopper, sdpa forward")
    assert {name for name in rivals if name.startswith("tim")} == ours
    monkeypatch.setitem(peers.FASTEST_FORWARD, "cuda", "kernel")
    rivals = peers.rivals("attention", direction, torch.device("cuda"))
    assert "tim, kernel" not in rivals
    assert ("tim, sdpa forward" in rivals) == (direction == "tangent")
    problem = Problem.random(ATTENTION, TINY, torch.float32, direction, CPU)
    with torch.set_grad_enabled(direction == "backward"):
        results = problem.call(peers.by_kernels("kernel"))()
    assert relative_error(results, problem.exact()) < 1e-5


@pytest.mark.parametrize("direction", ATTENTION.directions)
def test_float64_in_rows_is_that_of_the_formula(direction) -> None:
    size = Size("long", 1, 1030, 1, 4, 0, (0, 0, 0), 0)
    problem = Problem.random(ATTENTION, size, torch.float64, direction, CPU)
    with torch.set_grad_enabled(direction == "backward"):
        results = problem.call(ATTENTION.reference)()
    for actual, expected in zip(problem.exact(), results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_the_longest_sizes_of_a_cpu_are_measured_when_they_are_named() -> None:
    default = {size.name for size in ATTENTION.sizes("cpu", named=False)}
    named = {size.name for size in ATTENTION.sizes("cpu")}
    assert named - default == {"n16384-d64", "n16384-d72", "n16384-d128"}
    assert ATTENTION.sizes("cuda", named=False) == ATTENTION.sizes("cuda")


def test_a_row_has_every_peer_and_a_line_for_each(peers, tmp_path, monkeypatch, capsys) -> None:
    def rivals(*arguments):
        return {**peers.rivals(*arguments), "broken": lambda q, k, v: 1 / 0}

    monkeypatch.setitem(cases.SIZES, "cpu", (TINY,))
    monkeypatch.setattr("tim.bench.machine._COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr("tim.bench.machine._MATMUL_SIZE", {"cpu": 32})
    path, threads = tmp_path / "result.json", torch.get_num_threads()
    options = ["--device", "cpu", "--sizes", "tiny", "--directions", "tangent", "--seconds", "1e-3"]
    try:
        assert main(["attention", *options, "--json", str(path)], rivals=rivals) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(path.read_text())["rows"]
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    for row in rows:
        names = ["tim", "reference", "plain", "sdpa math", "tim, sdpa forward"]
        assert list(row["candidates"]) == names
        assert row["notes"] == ["broken failed: ZeroDivisionError: division by zero"]
    shown = capsys.readouterr().out
    assert "first / this" in shown and shown.count("tim, sdpa forward") == 2
