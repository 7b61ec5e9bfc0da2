"""The command `tim`, as a person meets it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import tim
from tim import cli
from tim.checkpoint import checkpoints

TINY = [
    "--model.hidden-size", "16", "--model.depth", "1", "--model.num-heads", "2",
    "--model.encoder-depth", "1", "--train.batch-size", "8", "--train.device", "cpu",
    "--train.no-tensorboard", "--train.sample-every", "0",
]  # fmt: skip


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "tim", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def denoising(run: Path) -> list[tuple[int, float]]:
    text = (run / "log.jsonl").read_text()
    whole = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return [(record["step"], record["denoising"]) for record in whole if "denoising" in record]


def test_train_then_sample(tmp_path, capsys) -> None:
    run = tmp_path / "run"
    flags = ["--train.steps", 30, "--train.log-every", 10, "--objective.derivative", "dde"]
    assert cli.run(["train", "digits", "--run", str(run), *TINY, *map(str, flags)]) == 0
    assert "step 30  denoising" in capsys.readouterr().err
    assert [step for step, value in denoising(run) if value > 0] == [10, 20, 30]

    out = tmp_path / "out" / "digits.png"
    asked = ["--steps", "1,2,4", "--classes", "7,7,3,0", "--seed", "5", "--cfg-scale", "2"]
    done = finish(start("sample", run, "--out", out, *asked))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out)
    with Image.open(out) as grid:
        assert grid.height == 2 + 3 * 50 and grid.width > 4 * 50
        first = grid.tobytes()
    assert cli.run(["sample", str(run), "--out", str(out), *asked]) == 0
    with Image.open(out) as grid:
        assert grid.tobytes() == first
    assert cli.run(["sample", str(run)]) == 0
    assert (run / "samples" / "steps-1-2-4-8-16-32.png").is_file()


def same_values(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_values(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_values, a, b))
    return a == b


def test_a_killed_run_resumes_bit_for_bit(tmp_path) -> None:
    flags = [*TINY, "--train.steps", 60, "--train.checkpoint-every", 20, "--train.log-every", 1]
    whole = start("train", "digits", "--run", tmp_path / "whole", *flags)
    run = tmp_path / "killed"
    process = start("train", "digits", "--run", run, *flags)
    while not (run / "log.jsonl").exists() or len(denoising(run)) < 25:
        assert process.poll() is None, finish(process).stderr
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert finish(process).returncode == -signal.SIGKILL
    newest = int(checkpoints(run / "checkpoints")[-1].name)
    assert newest in (20, 40) and len(denoising(run)) < 60

    done = finish(start("train", "digits", "--run", run, "--resume"))
    assert done.returncode == 0, done.stderr
    assert f"resuming at step {newest}" in done.stderr
    assert finish(whole).returncode == 0
    last = [tmp_path / name / "checkpoints" / "00000060" for name in ("whole", "killed")]
    for file in ("model.safetensors", "ema.safetensors"):
        assert same_values(*(load_file(path / file) for path in last)), file
    assert same_values(*(torch.load(path / "state.pt", weights_only=True) for path in last))
    assert denoising(tmp_path / "whole") == denoising(run)
    assert len(denoising(run)) == 60


def told(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one line on stderr of a command line that exits with 2."""
    assert cli.run([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured
    return captured.err


def test_mistakes_are_told_in_one_line(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.delenv("TIM_TRACEBACK", raising=False)
    run = tmp_path / "run"
    train = ["train", "digits", "--run", run, *TINY]
    assert "tim: no command 'trian'; there are train, sample" in told(capsys, "trian")
    assert "preset must be one of digits" in told(capsys, "train", "digit", "--run", run)
    assert "the preset comes first" in told(capsys, "train", "--run", run, "digits")
    assert "--run" in told(capsys, "train", "digits")
    unknown = told(capsys, *train, "--train.stepz", 3)
    assert "tim train: Unrecognized options: --train.stepz" in unknown
    assert "--train.steps" in unknown and "(see tim train digits --help)" in unknown
    assert "--train.steps" in told(capsys, *train, "--train.steps", "many")
    assert "train.steps must be at least 1, got 0" in told(capsys, *train, "--train.steps", 0)
    assert "float32" in told(capsys, *train, "--train.precision", "fp8")
    assert "got '1,b'" in told(capsys, *train, "--sample.steps", "1,b")
    assert "data.path is missing" in told(capsys, *train, "--data.kind", "folder")
    assert "absent does not exist" in told(
        capsys, *train, "--data.kind", "arrays", "--data.path", tmp_path / "absent"
    )
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    assert "none of the 1 images" in told(
        capsys, *train, "--data.kind", "folder", "--data.path", tmp_path / "broken"
    )
    assert "got [1, 8, 8]" in told(capsys, *train, "--model.in-channels", 3)
    assert not run.exists()
    assert "run is neither a file, a directory nor a hub id" in told(capsys, "sample", run)
    optional = told(capsys, "sample", run, "--steps", "1;2")
    assert "--steps: expected whole numbers with commas" in optional and "lambda" not in optional
    assert "give --transport.P-mean None" in told(capsys, *train, "--transport.name", "vp")


def test_taken_and_changed_runs(tmp_path, capsys) -> None:
    run = tmp_path / "run"
    train = ["train", "digits", "--run", run, *TINY, "--train.steps", 2]
    assert cli.run(list(map(str, train))) == 0
    capsys.readouterr()
    assert "holds a run: resume it" in told(capsys, *train)
    changed = told(capsys, *train, "--resume", "--train.seed", 4)
    assert "cannot change train.seed: it is 0, got 4" in changed
    resume = ["train", "digits", "--run", run, "--resume"]
    other = told(capsys, "train", "images-64", *resume[2:])
    assert "is a run of preset digits, not images-64" in other
    # The flags of the first call are in config.yaml and need no repeating.
    assert cli.run(list(map(str, [*resume, "--train.steps", 3]))) == 0
    assert "resuming at step 2" in capsys.readouterr().err
    assert "classes must be in 0 .. 9, got 10" in told(capsys, "sample", run, "--classes", "1,10")
    out = tmp_path / "new" / "a.foo"
    assert f"like, got {out}" in told(capsys, "sample", run, "--out", out)
    assert not out.parent.exists()
    (run / "config.yaml").write_text("preset: digits\nmodel: {depht: 2}\n")
    assert "unknown field model.depht" in told(capsys, "sample", run)


def test_a_run_that_has_to_stop_exits_with_1(tmp_path, capsys) -> None:
    flags = ["--train.steps", "20", "--train.lr", "1e30", "--train.max-bad-steps", "3"]
    code = cli.run(["train", "digits", "--run", str(tmp_path / "run"), *TINY, *flags])
    told = capsys.readouterr().err.splitlines()[-1]
    assert code == 1
    assert told.startswith("tim train: stopped at step") and "3 steps in a row" in told


def test_latents_are_not_said_to_be_pictures(tmp_path, capsys) -> None:
    np.savez(tmp_path / "latents.npz", x=np.ones((8, 4, 8, 8), np.float32), y=np.arange(8))
    data = ["--data.kind", "arrays", "--data.path", str(tmp_path / "latents.npz")]
    flags = [*TINY, *data, "--model.in-channels", "4", "--train.steps", "1"]
    assert cli.run(["train", "digits", "--run", str(tmp_path / "run"), *flags]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "trained 1 steps"
    pytest.importorskip("diffusers")
    missing = told(capsys, "sample", tmp_path / "run")
    assert "vae is missing: " in missing and "models latents of 4 channels" in missing


def test_help(capsys) -> None:
    assert cli.run(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in cli.COMMANDS)
    assert cli.run([]) == 2
    capsys.readouterr()
    assert cli.run(["train", "--help"]) == 0
    told = capsys.readouterr().out
    assert "tim-xl2-256" in told and "digits" in told
    for arguments in (["train", "digits", "--help"], ["sample", "--help"], ["info", "--help"]):
        with pytest.raises(SystemExit) as stop:
            cli.run(arguments)
        assert stop.value.code == 0
    told = capsys.readouterr().out
    for flag in (
        "--run", "--resume", "--data.path", "--train.steps", "--train.batch-size", "--ops",
        "--train.checkpoint-every", "--train.seed", "--objective.derivative", "--cfg-scale",
    ):  # fmt: skip
        assert flag in told, flag


def test_version(capsys) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == tim.__version__


def test_the_installed_command() -> None:
    command = Path(sys.executable).with_name("tim")
    if not command.is_file():
        pytest.skip(f"{command} is not there: the package runs from its source tree")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, tim.__version__), done.stderr


def test_tracebacks_can_be_had(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TIM_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        cli.run(["sample", str(tmp_path / "absent")])
