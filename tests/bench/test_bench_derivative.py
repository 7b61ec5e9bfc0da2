"""The derivative's benchmark: every candidate gives the same dF, in one pass or in two."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tim.bench import derivative, main
from tim.bench.derivative import TwoPasses, own_operators, own_steps
from tim.bench.step import Setup, StepSize
from tim.derivative import recomputes_activations, takes_tangents
from tim.models import TiMConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import peers

TINY = StepSize(
    "tiny",
    TiMConfig(
        input_size=8, hidden_size=48, depth=2, num_heads=3, num_classes=10, lora_hidden_size=16
    ),
    10,
)


@pytest.fixture
def setup() -> Setup:
    return Setup.random(TINY, torch.float32, torch.device("cpu"))


def test_operators_give_the_derivative_of_the_second_half(setup) -> None:
    exact = setup.exact_derivative()[5:]
    operators = own_operators(setup) | peers.operators(setup)
    assert list(operators) == ["jvp", "dde", "public dde", "public jvp"]
    for name, operator in operators.items():
        dF = operator()
        error = ((dF.double() - exact).norm() / exact.norm()).item()
        # A float32 difference over 0.01 has lost two digits.
        assert error < (1e-2 if "dde" in name else 1e-5), name
        assert not dF.requires_grad


def test_one_pass_and_two_take_the_same_step(setup) -> None:
    assert takes_tangents(setup.model) and not recomputes_activations(setup.model)
    two = TwoPasses(setup.model)
    assert not takes_tangents(two) and recomputes_activations(two)
    steps = own_steps(setup)
    results = {}
    for name in ("jvp", "jvp, two passes"):
        loss, dF = steps[name].objective()
        loss.backward()
        gradients = [p.grad.flatten() for p in setup.model.parameters()]
        results[name] = loss.detach(), dF, torch.cat(gradients), steps[name].take()
        setup.model.zero_grad()
    one, other = results.values()
    assert one[1].abs().max() > 0
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_run_has_operator_and_step(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(derivative.DERIVATIVE_SIZES, "cpu", (TINY,))
    monkeypatch.setattr("tim.bench.machine._COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr("tim.bench.machine._MATMUL_SIZE", {"cpu": 32})
    path, threads = tmp_path / "result.json", torch.get_num_threads()
    try:
        options = ["--device", "cpu", "--seconds", "1e-3", "--json", str(path)]
        assert main(["derivative", *options], peers) == 0
    finally:
        torch.set_num_threads(threads)
    operator, step = json.loads(path.read_text())["rows"]
    assert operator["benchmark"] == "derivative operator" and operator["shape"]["batch"] == 5
    assert list(operator["candidates"]) == ["jvp", "dde", "public dde", "public jvp"]
    assert step["benchmark"] == "derivative step" and step["shape"]["batch"] == 10
    assert list(step["candidates"]) == [
        "jvp", "jvp, two passes", "dde", "public dde", "public jvp",
    ]  # fmt: skip
    for row in (operator, step):
        for name, candidate in row["candidates"].items():
            assert candidate["peak_bytes"] > 0
            assert (candidate["error"] < 1e-5) == ("jvp" in name)
    shown = capsys.readouterr().out
    assert "derivative operator" in shown and "jvp, two passes" in shown
