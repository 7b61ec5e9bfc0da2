"""Checkpoint directories that are there as a whole or not at all.

A checkpoint is written to a folder `00001000.tmp-PID`, flushed to the disk and then renamed to
`00001000`. Whatever a killed process leaves behind has a name that no reader looks at, and goes
when the next run starts.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from tim.models.loading import checkpoints

_TEMPORARY = re.compile(r"\d{8,}\.tmp-.*")


def begin(folder: Path, step: int) -> Path:
    """A new, empty temporary directory for checkpoint `step` below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{step:08d}.tmp-{os.getpid()}"
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    return temporary


def commit(temporary: Path, keep: int) -> Path:
    """Give a finished checkpoint its name, and delete all but the `keep` newest ones."""
    for path in [*temporary.rglob("*"), temporary]:
        _flush(path)
    final = temporary.with_name(temporary.name.split(".")[0])
    if final.exists():
        _discard(final)
    os.replace(temporary, final)
    _flush(final.parent)
    for old in checkpoints(final.parent)[:-keep]:
        _discard(old)
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    return next(reversed(checkpoints(folder)), None)


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete what a killed process left half-written below `folder`; returns the paths."""
    if not folder.is_dir():
        return []
    leftovers = [path for path in folder.iterdir() if _TEMPORARY.fullmatch(path.name)]
    for path in leftovers:
        shutil.rmtree(path)
    return leftovers


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that nobody reads it; returns its new path."""
    number = 0
    while (aside := checkpoint.with_name(f"{checkpoint.name}.damaged-{number}")).exists():
        number += 1
    os.replace(checkpoint, aside)
    return aside


def _discard(checkpoint: Path) -> None:
    """Delete a checkpoint; renamed first, since half of one must not look like a checkpoint."""
    doomed = checkpoint.with_name(f"{checkpoint.name}.tmp-old")
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def _flush(path: Path) -> None:
    """Wait until the file or folder is on the disk, so that the rename cannot get there first."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
