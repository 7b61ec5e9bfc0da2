"""Checkpoints of several ranks by torch.distributed.checkpoint: each writes what it holds.

00001000/shards/     .metadata and the files of the ranks, for any number of ranks to read
         state.json  counters
         SHA256SUMS  checksums of these files
"""

from __future__ import annotations

import io
import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from tim.checkpoint.training import DamagedCheckpoint, Training, system_error
from tim.models.loading import SHARDS

STATE = "state.json"
#: Where the names of the tensors of each kind begin.
MODEL, AVERAGE, OPTIMIZER = "model.", "ema.", "optimizer."


def tensors_of(training: Training) -> dict[str, Tensor]:
    """All tensors of a training run by the names they have in a checkpoint."""
    found = {
        **{MODEL + name: value for name, value in training.model.state_dict().items()},
        **{AVERAGE + name: value for name, value in training.average.state_dict().items()},
    }
    for name, state in training.optimizer_state().items():
        found |= {f"{OPTIMIZER}{name}.{key}": value for key, value in state.items()}
    return found


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    (folder / STATE).write_text(json.dumps(dict(state)))


def read(path: Path, training: Training) -> dict[str, Any]:
    """Load checkpoint `path` into `training`, each rank its part; returns its state.

    Raises DamagedCheckpoint, or ValueError when the weights are of another model.
    """
    reader = Reader(path / SHARDS)
    try:
        state = json.loads((path / STATE).read_text())
        saved = reader.read_metadata().state_dict_metadata
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path} is damaged: {' '.join(str(error).split())}") from None
    _create_optimizer_state(training, saved)
    targets = tensors_of(training)
    _check_fit(path, targets, saved)
    load_tensors(targets, reader)
    return state


def read_weights(shards: Path, kind: str) -> dict[str, Tensor]:
    """The whole weights of a kind (`MODEL`, `AVERAGE`) by their names in the network, in one
    process.

    Raises ValueError when the files are damaged.
    """
    reader = Reader(shards)
    saved = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in saved.items()
        if name.startswith(kind)
    }
    load_tensors(tensors, reader, alone=True)
    return {name.removeprefix(kind): tensor for name, tensor in tensors.items()}


def load_tensors(targets: dict[str, Tensor], reader: Reader, alone: bool = False) -> None:
    """Fill tensors, sharded or not, from a checkpoint; together with all other ranks, or alone."""
    alone = alone or not torch.distributed.is_initialized()
    with warnings.catch_warnings():
        # It says that no other process takes part, which is known.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(targets, storage_reader=reader, no_dist=alone)
        except dcp.CheckpointException as error:
            reasons = {str(reason) for reason, _ in error.failures.values()}
            text = " ".join("; ".join(sorted(reasons)).split())
            raise DamagedCheckpoint(f"{reader.path} is damaged: {text}") from None


def _create_optimizer_state(training: Training, saved: Mapping[str, Any]) -> None:
    """Room for the optimizer's state: what a checkpoint holds of each parameter."""
    training.optimizer.state.clear()
    for name, parameter in training.model.named_parameters():
        prefix = f"{OPTIMIZER}{name}."
        keys = [key for key in saved if key.startswith(prefix) and "." not in key[len(prefix) :]]
        if keys:
            training.optimizer.state[parameter] = {
                key[len(prefix) :]: torch.zeros_like(parameter)
                if saved[key].size == parameter.shape
                else torch.zeros(saved[key].size, device=parameter.device)
                for key in keys
            }


def _check_fit(path: Path, targets: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    for name in sorted(targets.keys() ^ saved.keys()):
        where = "lacks" if name in targets else "holds also"
        raise ValueError(f"{path} does not fit the model: it {where} {name}")
    for name, target in targets.items():
        if saved[name].size != target.shape:
            raise ValueError(
                f"{path} does not fit the model: {name} has shape {list(saved[name].size)} there, "
                f"{list(target.shape)} here"
            )


class Writer(dcp.FileSystemWriter):
    """PyTorch's writer, which tells why the system would not take a file."""

    def write_data(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().write_data(*arguments, **options)
        except Exception as error:
            raise system_error(error) from None


class Reader(dcp.FileSystemReader):
    """PyTorch's reader, whose metadata is a pickle, with nothing unpickled but such metadata."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises ValueError for anything else."""
        data = (Path(self.path) / ".metadata").read_bytes()
        try:
            metadata = _MetadataUnpickler(io.BytesIO(data)).load()
        except OSError:
            raise
        except Exception as error:  # an unpickler given junk may raise anything
            raise ValueError(f"{self.path}/.metadata is damaged: {error}") from None
        if not isinstance(metadata, Metadata):
            raise ValueError(f"{self.path}/.metadata is damaged: it holds no metadata")
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    CLASSES = (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )  # fmt: skip
    NAMES = frozenset(
        (
            *(("torch.distributed.checkpoint.metadata", name) for name in CLASSES),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("torch", "Size"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
        )
    )

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and (module, name) not in self.NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)
