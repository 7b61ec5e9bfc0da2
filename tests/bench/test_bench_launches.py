"""Counting launches: what is one, what is none, and that the counts of a step add up."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tim import ops
from tim.bench import launch_report, main
from tim.bench.launches import KERNELS, counting, list_launches
from tim.bench.step import StepSize
from tim.models import TiMConfig
from tim.step import PHASES

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import peers

ROOT = Path(__file__).parents[2]


def launches(function) -> dict[str, int]:
    with counting() as counter:
        function()
    return dict(sum(counter.counts.values(), start=type(counter.counts[PHASES[0]])()))


def test_operations_are_counted_and_views_and_allocations_are_not() -> None:
    x = torch.randn(4, 6)

    def function() -> None:
        y = torch.empty(4, 6)
        y.copy_(x.t().t().view(2, 12).reshape(4, 6)[:, 1:].expand(4, 5).sum())
        x[None].squeeze(0).detach().chunk(2)
        torch.zeros(3)

    assert launches(function) == {"sum": 1, "copy_": 1, "zeros": 1}


def test_nothing_is_launched_for_no_elements() -> None:
    assert launches(lambda: torch.randn(0, 3) + 1) == {}


def test_backward_passes_are_counted() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(5, 3, requires_grad=True)
    counted = launches(lambda: layer(x).sum().backward())
    assert counted["addmm"] == 1 and counted["mm"] == 2  # gradients of x and of the weight


@pytest.mark.skipif("cpu" not in ops.available()["adaln"], reason="no kernels in this build")
def test_kernels_count_as_often_as_a_gpu_launches() -> None:
    x, y = (torch.randn(2, 3, 8, requires_grad=True) for _ in range(2))
    gate, shift, scale = (torch.randn(2, 1, 8, requires_grad=True) for _ in range(3))
    counted = launches(lambda: ops.gated_adaln(x, y, gate, shift, scale)[1].sum().backward())
    assert counted["tim::adaln"] == 1 and counted["tim::adaln_backward"] == 2


@pytest.mark.parametrize("name", KERNELS)
def test_the_gpu_sources_launch_as_often(name) -> None:
    """Of each launcher the longest way through it; alternatives stand behind if and else."""
    source = (ROOT / "csrc" / "cuda" / f"{name}.cu").read_text()
    assert source.count("launch(call") == KERNELS[name]


@pytest.mark.parametrize(("batch", "launched"), [(2, 2), (128, 1)])
def test_losses_of_few_samples_are_two_kernels(batch, launched) -> None:
    x = torch.randn(batch, 1, 16, 16)
    coefficients, time_weight = torch.rand(batch, 5), torch.ones(batch)
    counted = launches(
        lambda: ops.transition_loss(x, x, x, coefficients, time_weight=time_weight).loss
    )
    assert counted["tim::transition_loss"] == launched


def test_lists_are_cut_as_pytorch_cuts_them() -> None:
    def tensors(count: int, elements: int) -> list[torch.Tensor]:
        return [torch.empty(elements, device="meta") for _ in range(count)]

    assert list_launches([], 1) == 0
    assert list_launches(tensors(110, 10), 1) == 1 and list_launches(tensors(111, 10), 1) == 2
    assert list_launches(tensors(36, 10), 4) == 1 and list_launches(tensors(37, 10), 4) == 2
    # 320 blocks of 65536 elements fill a launch, wherever a tensor ends.
    assert list_launches(tensors(1, 320 * 65536), 4) == 1
    assert list_launches(tensors(1, 320 * 65536 + 1), 4) == 2
    assert list_launches(tensors(3, 200 * 65536), 2) == 2
    parameters = [nn.Parameter(torch.ones(5)) for _ in range(40)]
    for parameter in parameters:
        parameter.grad = torch.ones(5)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    optimizer.step()
    assert launches(optimizer.step) == {"_fused_adamw_": 2, "_foreach_add_": 1}


def test_phases_are_told_apart() -> None:
    with counting() as counter:
        for phase in PHASES[:2]:
            with torch.profiler.record_function(phase):
                torch.ones(2)
        torch.ones(2) + 1
    assert list(counter.totals.values()) == [1, 3, 0, 0, 0]


def test_the_command_counts_all_candidates(monkeypatch, tmp_path, capsys) -> None:
    config = TiMConfig(input_size=8, hidden_size=32, depth=3, num_heads=2, num_classes=10)
    monkeypatch.setitem(launch_report.LAUNCH_SIZES, "cpu", (StepSize("tiny", config, 10),))
    path = tmp_path / "launches.json"
    assert main(["launches", "--device", "cpu", "--json", str(path)], peers) == 0
    rows = {row["candidate"]: row for row in json.loads(path.read_text())["launches"]}
    assert list(rows) == [
        "jvp", "jvp, references", "dde", "dde, references", "public dde", "public jvp",
    ]  # fmt: skip
    for row in rows.values():
        assert list(row["launches"]) == list(PHASES)
        assert row["total"] == sum(sum(counts.values()) for counts in row["launches"].values())
        assert all(sum(counts.values()) for counts in row["launches"].values())
    if "cpu" in ops.available()["adaln"]:
        # With three blocks; the goal of five is for the sizes that the command has.
        assert rows["jvp"]["total"] < rows["public jvp"]["total"] / 4
    assert "public jvp / this" in capsys.readouterr().out
