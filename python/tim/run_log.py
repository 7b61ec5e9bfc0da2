"""What a run tells while it trains: log.jsonl, TensorBoard, and a line on the terminal."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from tim.config import TrainConfig


class RunLog:
    """Records of a run in `run`/log.jsonl, one JSON object a line, and beside it for the eyes.

    A record has `step` and `time` (seconds since 1970). Records of steps after `start_step` are
    dropped first: they were written by a process that was killed before its next checkpoint, and
    those steps are taken again.
    """

    def __init__(self, run: Path, *, start_step: int, steps: int, tensorboard: bool):
        self.path = run / "log.jsonl"
        _keep_until(self.path, start_step)
        self._file = self.path.open("a")
        self._start = start_step
        self.console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task(
            run.name, total=steps, completed=start_step, status="starting"
        )
        self._writer = _tensorboard_writer(run, start_step, self) if tensorboard else None

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record numbers of one step; those that are not finite become null."""
        self.event(step, **values)
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"train/{name}", value, step)
        status = (
            f"denoising {values['denoising']:.4f}  {values['images_per_second']:.0f} images/s  "
            f"{values['memory_gb']:.2f} GB"
        )
        if values["skipped_steps"]:
            status += f"  {values['skipped_steps']:.0f} skipped"
        self._progress.update(self._task, completed=step, status=status)
        if not self.console.is_terminal:
            left = (self._progress.tasks[self._task].total or 0) - step
            rate = values["steps_per_second"]
            eta = f"  {_duration(left / rate)} left" if rate > 0 and left > 0 else ""
            self.note(f"step {step}  {status}{eta}")

    def event(self, step: int, **values: Any) -> None:
        """Record anything else that JSON can hold."""
        record = {"step": step, "time": round(time.time(), 3)}
        for name, value in values.items():
            finite = not isinstance(value, float) or math.isfinite(value)
            record[name] = value if finite else None
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def picture(self, step: int, name: str, pixels: Tensor) -> None:
        """Show a picture, uint8 [H, W, 3], in TensorBoard."""
        if self._writer is not None:
            self._writer.add_image(name, pixels.numpy(), step, dataformats="HWC")

    def skipped_files(self, step: int, reasons: Mapping[str, str]) -> None:
        """Add files that could not be read to skipped_files.txt, and name those that are new."""
        path = self.path.with_name("skipped_files.txt")
        known = path.read_text().splitlines() if path.exists() else []
        # By name: the reason may hold the path, which changes with the folder a run is started in.
        listed = {line.split("\t")[0] for line in known}
        names = [name for name in reasons if name not in listed]
        if not names:
            return
        lines = sorted([*known, *(f"{name}\t{reasons[name]}" for name in names)])
        _replace(path, "".join(f"{line}\n" for line in lines))
        self.event(step, event="skipped_files", count=len(lines), files=names)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        shown = ", ".join(names[:3]) + more
        self.note(f"{len(names)} images cannot be read and are skipped: {shown} (see {path})")

    def note(self, text: str) -> None:
        """A line on the terminal."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class NoLog:
    """Takes what a RunLog takes, and drops it: for the ranks that are not to write."""

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def _drop(self, *arguments: object, **values: object) -> None:
        pass

    advance = scalars = event = picture = skipped_files = note = _drop


def open_log(run: Path, step: int, train: TrainConfig, is_main: bool) -> RunLog | NoLog:
    """The log of a run that goes on after `step`; of several ranks only the main one keeps it."""
    if not is_main:
        return NoLog()
    return RunLog(run, start_step=step, steps=train.steps, tensorboard=train.tensorboard)


def _keep_until(path: Path, step: int) -> None:
    """Drop records of later steps, and a last line that a killed process left unfinished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    _replace(path, "".join(kept))


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _tensorboard_writer(run: Path, start_step: int, log: RunLog) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.note(
            "TensorBoard is not installed, log.jsonl has it all; to get it: pip install tensorboard"
        )
        return None
    return SummaryWriter(run / "tensorboard", purge_step=start_step + 1 if start_step else None)


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory use so far: allocated on the CUDA device, or resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # Linux counts in kilobytes, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
