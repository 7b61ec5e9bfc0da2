"""Checkpoints that are there as a whole or not at all.

    checkpoints/00001000/model.safetensors   weights, with the model's configuration in the metadata
                         ema.safetensors     averaged weights, likewise
                         state.pt            optimizer, random states, counters

A checkpoint is written to a folder `00001000.tmp-PID`, flushed to the disk and then renamed.
Whatever a killed process leaves behind has a name that no reader looks at, and goes when the next
run starts.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tim.models.loading import CHECKPOINT_FILES, checkpoints

MODEL, AVERAGE, STATE = CHECKPOINT_FILES
_TEMPORARY = re.compile(r"\d{8,}\.tmp-.*")


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    average: nn.Module,
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write checkpoint `step` below `folder` and delete all but the `keep` newest.

    `model.config.to_dict()` goes into the metadata of the weight files; `state` may hold tensors
    and plain values (it is read back with `weights_only=True`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{step:08d}"
    temporary = folder / f"{final.name}.tmp-{os.getpid()}"
    temporary.mkdir()
    save_weights(model, temporary / MODEL)
    save_weights(average, temporary / AVERAGE)
    torch.save(dict(state), temporary / STATE)
    for path in [*temporary.iterdir(), temporary]:
        _flush(path)
    if final.exists():
        _discard(final)
    os.replace(temporary, final)
    _flush(folder)
    for old in checkpoints(folder)[:-keep]:
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


def load_checkpoint(path: Path, model: nn.Module, average: nn.Module) -> dict[str, Any]:
    """Load the weights of checkpoint `path` into both modules and return its state, on the CPU.

    Raises ValueError naming the file that is damaged or does not fit.
    """
    load_weights(model, path / MODEL)
    load_weights(average, path / AVERAGE)
    try:
        return torch.load(path / STATE, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, KeyError, ValueError) as error:
        raise _damaged(path / STATE, error) from None


def save_weights(model: nn.Module, path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    # One entry at most: safetensors writes several in random order, and equal weights would not be
    # equal files.
    config = getattr(model, "config", None)
    save_file(tensors, path, None if config is None else {"config": json.dumps(config.to_dict())})


def load_weights(model: nn.Module, path: Path) -> None:
    """Raises ValueError when `path` is damaged, or its tensors are not those of `model`."""
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise _damaged(path, error) from None
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model: {' '.join(str(error).split())}") from None


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states(device: torch.device) -> dict[str, Any]:
    """States of the global generators (on CUDA: of `device` only, other devices are left alone).

    `torch.load(weights_only=True)` can read them back.
    """
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Inverse of `random_states`; `device` need not be the one they were taken from."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def _discard(checkpoint: Path) -> None:
    """Delete a checkpoint; renamed first, since half of one must not look like a checkpoint."""
    doomed = checkpoint.with_name(f"{checkpoint.name}.tmp-old")
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def _damaged(file: Path, error: Exception) -> ValueError:
    """The error to raise for a file that cannot be read, with the way out where there is one."""
    folder = file.parent
    older = [path for path in checkpoints(folder.parent) if path.name < folder.name]
    reason = " ".join(str(error).split()) or type(error).__name__
    remedy = f"; delete {folder} to go on from {older[-1].name}" if older else ""
    return ValueError(f"{file} is damaged: {reason}{remedy}")


def _flush(path: Path) -> None:
    """Wait until the file or folder is on the disk, so that the rename cannot get there first."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
