"""log.jsonl, TensorBoard and the terminal."""

import json
import sys

import pytest
import torch

from tim.run_log import RunLog, peak_memory_gb

VALUES = {
    "denoising": 1.5, "grad_norm": float("nan"), "steps_per_second": 2.0,
    "images_per_second": 64.0, "memory_gb": 0.5, "skipped_steps": 0,
}  # fmt: skip


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_records_are_valid_json_at_once(tmp_path, capsys) -> None:
    with RunLog(tmp_path, start_step=0, steps=10, tensorboard=False) as log:
        log.event(0, event="start")
        log.scalars(4, VALUES)
        start, record = lines(tmp_path)
    assert start["event"] == "start"
    assert record["step"] == 4 and record["denoising"] == 1.5 and record["grad_norm"] is None
    told = capsys.readouterr().err
    assert "step 4  denoising 1.5000  64 images/s  0.50 GB  0:03 left" in told


def test_a_resumed_log_forgets_the_steps_taken_again(tmp_path) -> None:
    with RunLog(tmp_path, start_step=0, steps=10, tensorboard=False) as log:
        for step in range(1, 7):
            log.event(step, value=step)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "val')
    with RunLog(tmp_path, start_step=4, steps=10, tensorboard=False) as log:
        log.event(5, value=50)
    assert [(r["step"], r["value"]) for r in lines(tmp_path)] == [
        (1, 1), (2, 2), (3, 3), (4, 4), (5, 50)
    ]  # fmt: skip


def test_tensorboard_gets_scalars_and_pictures(tmp_path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with RunLog(tmp_path, start_step=0, steps=10, tensorboard=True) as log:
        log.scalars(4, VALUES)
        log.picture(4, "samples", torch.zeros(5, 7, 3, dtype=torch.uint8))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (scalar,) = events.Scalars("train/denoising")
    assert (scalar.step, scalar.value) == (4, 1.5)
    (picture,) = events.Images("samples")
    assert (picture.height, picture.width) == (5, 7)


def test_a_missing_tensorboard_is_noted_and_does_not_matter(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with RunLog(tmp_path, start_step=0, steps=10, tensorboard=True) as log:
        log.scalars(4, VALUES)
        log.picture(4, "samples", torch.zeros(5, 7, 3, dtype=torch.uint8))
    assert len(lines(tmp_path)) == 1
    assert capsys.readouterr().err.count("TensorBoard is not installed") == 1
    assert not (tmp_path / "tensorboard").exists()


def test_a_skipped_file_is_named_once_whatever_the_reason(tmp_path, capsys) -> None:
    bad = {"a.png": "cut short", "b.png": "cannot identify pictures/b.png"}
    with RunLog(tmp_path, start_step=0, steps=10, tensorboard=False) as log:
        log.skipped_files(1, {"b.png": bad["b.png"]})
        log.skipped_files(2, {**bad, "b.png": "cannot identify /home/me/pictures/b.png"})
        log.skipped_files(3, bad)
    told = (tmp_path / "skipped_files.txt").read_text().splitlines()
    assert told == [f"{name}\t{reason}" for name, reason in bad.items()]
    assert [(r["count"], r["files"]) for r in lines(tmp_path)] == [(1, ["b.png"]), (2, ["a.png"])]
    assert capsys.readouterr().err.count("b.png") == 1
    assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]


def test_peak_memory_is_that_of_the_process() -> None:
    before = peak_memory_gb(torch.device("cpu"))
    assert 0.05 < before < 100
    block = torch.ones(int(before * 1e9) // 4 + 50_000_000)
    assert peak_memory_gb(torch.device("cpu")) > before + 0.1
    del block
