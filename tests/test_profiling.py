"""The trace that --profile writes and the table of its phases. Several ranks: tests/distributed."""

import gzip
import json
import re
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from tim.cli import run as command
from tim.meter import DATA
from tim.profiling import ACTIVE, COMMUNICATION, EXPOSED, STEPS, breakdown, common, length, merged
from tim.step import PHASES
from tim.trainer import Trainer
from tiny_runs import config


def test_a_trace_has_the_phases_of_the_steps(tmp_path, capsys) -> None:
    run = tmp_path / "run"
    Trainer(config(steps=STEPS + 1), run).train(profile=True)
    (path,) = (run / "profile").iterdir()
    assert path.name == "rank0.json.gz"
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    for phase in PHASES:
        found = [e for e in events if e.get("name") == phase and e.get("ph") == "X"]
        assert len(found) == ACTIVE, phase
    # Made, and brought to the device.
    assert sum(e.get("name") == DATA for e in events) in (2 * ACTIVE, 2 * ACTIVE + 1)
    (record,) = (
        r for r in map(json.loads, (run / "log.jsonl").open()) if r.get("event") == "profile"
    )
    assert record["step"] == STEPS and record["trace"] == str(path)
    assert list(record["seconds"]) == [DATA, *PHASES]
    assert all(0 < seconds < 60 for seconds in record["seconds"].values())
    told = capsys.readouterr().err
    for phase in PHASES:
        assert re.search(rf"^  {phase} +\d+\.\d\d\d ms$", told, re.M), told


def test_a_run_is_not_changed_by_its_profile(tmp_path) -> None:
    values = []
    for profile in (False, True):
        run = tmp_path / str(profile)
        Trainer(config(steps=STEPS), run).train(profile=profile)
        records = map(json.loads, (run / "log.jsonl").open())
        values.append([(r["step"], r["denoising"]) for r in records if "denoising" in r])
        assert (run / "profile").exists() == profile
    assert values[0] == values[1] and len(values[0]) == STEPS


def test_a_run_too_short_for_it_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=f"train.steps must be at least {STEPS}, got {STEPS - 1}"):
        Trainer(config(steps=STEPS - 1), tmp_path / "run").train(profile=True)


def test_a_run_that_ends_early_says_so(tmp_path, capsys) -> None:
    trainer = Trainer(config(steps=STEPS, max_bad_steps=1), tmp_path / "run")
    trainer.parameters[0].data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        trainer.train(profile=True)
    assert "no profile: the run ended before" in capsys.readouterr().err
    assert not (tmp_path / "run" / "profile").exists()


def test_the_command_has_the_flag(tmp_path, capsys) -> None:
    flags = ["--train.steps", str(STEPS - 1), "--train.device", "cpu", "--profile"]
    assert command(["train", "digits", "--run", str(tmp_path / "run"), *flags]) == 2
    assert f"--profile records the last {ACTIVE} of {STEPS} steps" in capsys.readouterr().err


def event(name: str, start: float, end: float, device: DeviceType = DeviceType.CPU):
    """As the profiler has them, in microseconds."""
    return SimpleNamespace(
        name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end)
    )


def test_communication_alone_is_what_no_computation_covers() -> None:
    events = [
        event(PHASES[1], 0, 300),
        event("aten::mm", 0, 100), event("aten::mul", 50, 120), event("tim::adaln", 180, 200),
        event("gloo:all_reduce", 90, 140), event("gloo:all_reduce", 130, 190),
    ]  # fmt: skip
    seconds = breakdown(events, steps=1)
    assert seconds[PHASES[1]] == pytest.approx(300e-6)
    assert seconds[COMMUNICATION] == pytest.approx(100e-6)
    assert seconds[EXPOSED] == pytest.approx(60e-6)
    # On a GPU it is the kernels that count, and not what the host does.
    cuda = DeviceType.CUDA
    events += [event("ncclDevKernel", 400, 500, cuda), event("gemm", 450, 600, cuda)]
    seconds = breakdown(events, steps=2)
    assert seconds[COMMUNICATION] == pytest.approx(50e-6)
    assert seconds[EXPOSED] == pytest.approx(25e-6)
    assert COMMUNICATION not in breakdown(events[:2], steps=1)


def test_spans() -> None:
    assert merged([(4, 6), (0, 2), (1, 3), (5, 5)]) == [(0, 3), (4, 6)]
    assert common([(0, 3), (4, 6)], [(2, 5), (5.5, 9)]) == [(2, 3), (4, 5), (5.5, 6)]
    assert common([], [(0, 1)]) == [] and length([(0, 3), (4, 6)]) == 5
