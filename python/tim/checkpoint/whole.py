"""Checkpoints of one process, or written by one for all: every tensor whole.

00001000/model.safetensors   weights, with the model's configuration in the metadata
         ema.safetensors     averaged weights, likewise
         state.pt            optimizer, random states, counters
         SHA256SUMS          checksums of these files
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tim._checksums import digest, write_sums
from tim.checkpoint.training import DamagedCheckpoint, Training, like, set_optimizer_state
from tim.models.loading import CHECKPOINT_FILES

MODEL, AVERAGE, STATE = CHECKPOINT_FILES


class Staged(NamedTuple):
    """Copies of the training state in main memory; training may go on while they are written."""

    weights: dict[str, dict[str, Tensor]]
    config: Any
    state: dict[str, Any]


def stage(training: Training, state: Mapping[str, Any]) -> Staged:
    def copied(values: Any) -> Any:
        return tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), values)

    weights = {MODEL: training.model.state_dict(), AVERAGE: training.average.state_dict()}
    whole = {**state, "optimizer": training.optimizer.state_dict()}
    return Staged(copied(weights), getattr(training.model, "config", None), copied(whole))


def write(folder: Path, staged: Staged) -> None:
    """Write the files of a checkpoint into the empty directory `folder`."""
    for name, tensors in staged.weights.items():
        save_weights(tensors, staged.config, folder / name)
    # Given a path, torch.save hides the system's reason why a file cannot be written.
    with (folder / STATE).open("wb") as file:
        torch.save(staged.state, file)
    write_sums(folder, {name: digest(folder / name) for name in CHECKPOINT_FILES})


def read(path: Path, training: Training) -> dict[str, Any]:
    """Load checkpoint `path` into `training`, sharded or not; returns its state, on the CPU.

    Raises DamagedCheckpoint naming the file, or ValueError when the weights are of another model.
    """
    load_weights(training.model, path / MODEL)
    load_weights(training.average, path / AVERAGE)
    try:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, KeyError, ValueError) as error:
        raise _damaged(path / STATE, error) from None
    # Keyed by the parameters' positions, as PyTorch's optimizers do it.
    by_position = state.pop("optimizer")["state"]
    names = [name for name, _ in training.model.named_parameters()]
    moments = {names[position]: values for position, values in by_position.items()}
    set_optimizer_state(training, moments)
    return state


def save_weights(tensors: Mapping[str, Tensor], config: Any, path: Path) -> None:
    """Write a safetensors file that `tim.load` can read by itself."""
    # One entry at most: safetensors writes several in random order, and equal weights would not be
    # equal files.
    metadata = None if config is None else {"config": json.dumps(config.to_dict())}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def load_weights(model: nn.Module, path: Path) -> None:
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None
    own = model.state_dict()
    fitting = {
        name: like(tensor, own[name]) if name in own else tensor for name, tensor in state.items()
    }
    try:
        model.load_state_dict(fitting)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model: {' '.join(str(error).split())}") from None


def _damaged(file: Path, error: Exception) -> DamagedCheckpoint:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DamagedCheckpoint(f"{file} is damaged: {reason}")
