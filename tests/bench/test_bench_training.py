"""Training on one rank and on two, measured for real at a tiny size."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tim.bench import main, ranks, step, summary, training
from tim.bench.step import StepSize
from tim.models import TiM, TiMConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import peers

CONFIG = TiMConfig(
    input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=10, lora_hidden_size=8
)
TINY = StepSize("tiny", CONFIG, 10)
CANDIDATES = ["jvp", "jvp, references", "dde", "dde, references", "public dde"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(step.STEP_SIZES, "cpu", (TINY,))
    monkeypatch.setattr("tim.bench.machine._COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr("tim.bench.machine._MATMUL_SIZE", {"cpu": 32})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_one_rank_and_two_are_measured_beside_the_peer(tmp_path, capsys) -> None:
    path = tmp_path / "result.json"
    arguments = ["training", "--device", "cpu", "--seconds", "0.001", "--json", str(path)]
    assert main(arguments, peers) == 0
    result = json.loads(path.read_text())
    (run,) = result["runs"]
    assert run["command"] == "tim bench " + " ".join(arguments)
    assert run["threads_per_rank"] == 1 and run["failures"] == []
    alone, both = result["rows"]
    assert (alone["size"], both["size"]) == ("tiny x 1", "tiny x 2")
    for row in (alone, both):
        assert row["shape"]["batch"] == 10 and row["notes"] == []
        assert list(row["candidates"]) == CANDIDATES
        for name, candidate in row["candidates"].items():
            assert candidate["times"]["samples"] >= 5 and candidate["times"]["minimum"] > 0
            assert candidate["peak_bytes"] > 0
            # Every rank differentiates for itself, whatever is added up afterwards.
            assert (candidate["error"] < 1e-5) == name.startswith("jvp")
            assert candidate["error"] < 1e-2
    gradients = 4 * sum(parameter.numel() for parameter in TiM(CONFIG).parameters())
    assert all(candidate["peak_bytes"] > gradients for candidate in alone["candidates"].values())
    shown = capsys.readouterr().out
    (line,) = (s for s in shown.splitlines() if "tiny x 2" in s and "public dde" in s)
    times = [row["candidates"]["public dde"]["times"]["median"] for row in (alone, both)]
    assert f"{20 / times[1]:.4g}" in line and f"{times[0] / times[1]:.0%}" in line
    summary.show(result)
    assert "public dde" in capsys.readouterr().out


def test_what_a_process_said_when_it_failed_is_told(capsys, monkeypatch) -> None:
    broken = StepSize("broken", CONFIG, 0)
    monkeypatch.setitem(step.STEP_SIZES, "cpu", (broken,))
    assert main(["training", "--device", "cpu", "--ranks", "1", "--seconds", "0.001"]) == 1
    assert "failed: training broken: rank 0 of 1 failed:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "huge"], "--sizes must be among tiny, got 'huge'"),
        (["--ranks", "1,0"], "must be positive numbers, got '1,0'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["training", "--device", "cpu", *arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tim bench training: ") and message in line


def test_there_must_be_a_gpu_for_each_rank(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ranks.sizes_that_fit(torch.device("cuda"), (1, 2, 4)) == [1, 2]
    assert ranks.sizes_that_fit(torch.device("cpu"), (1, 2, 4)) == [1, 2, 4]


def test_scaling_is_time_alone_over_time_together() -> None:
    def row(ranks: int, median: float) -> dict:
        times = {"median": median, "lower_quartile": median, "upper_quartile": median}
        candidate = {"times": times, "peak_bytes": 1 << 20, "error": 1e-7}
        shape = {"batch": 8, "ranks": ranks}
        return {"size": f"a x {ranks}", "shape": shape, "candidates": {"jvp": candidate}}

    (cells,) = training.row_cells(row(2, 0.5), row(1, 0.4))
    assert cells[:7] == ("a x 2", "jvp", "500 ms", "0%", "32", "1.00", "80%")
    (cells,) = training.row_cells(row(2, 0.5), None)
    assert cells[6] == "-"
