"""Shards of latents on disk.

    encode.json           what the shards were made from and how
    00000.safetensors     the first images of the source, 00001 the next, ...

A shard holds, for each size HxW of its latents, `HxW.latents` [n, 2, C, H, W] (as it was, and
mirrored), `HxW.labels` [n] unless there are captions, and `HxW.features` [n, 2, N, K] if asked for.
Its metadata entry `about` is JSON: names and captions in the same order, and files left out, with
the reason. A shard is written under another name and renamed, so that one that is there is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX_FILE = "encode.json"
#: Settings that a restarted command may change.
_FREE = {"source"}


@dataclass(frozen=True)
class Index:
    """Contents of encode.json."""

    source: str
    """Where the images came from."""
    samples: int
    """Images in the source."""
    digest: str
    """Digest of their names: the source of a restarted command must be the same."""
    shard_size: int
    """Images of the source to a shard."""
    vae: str
    """Autoencoder."""
    factor: int
    """Pixels to a latent along a side."""
    channels: int
    """Channels of the latents."""
    image_size: int
    """Side of the images in pixels; of others than squares, the root of their area."""
    sizes: list[list[int]]
    """Heights and widths of the latents, [[H, W], ...]."""
    dtype: str
    """Of latents and features."""
    posterior: str
    """What of a variational autoencoder's posterior: mean or sample."""
    seed: int
    """Of those samples."""
    classes: list[str]
    """Names of the labels."""
    captions: str | None
    """Where captions came from; None: there are labels."""
    features: str | None
    """Encoder of the features."""
    feature_patch: int | None
    """Latents to a feature along a side."""

    @property
    def shards(self) -> int:
        return -(-self.samples // self.shard_size)

    def save(self, folder: Path) -> None:
        temporary = folder / f"{INDEX_FILE}.tmp-{os.getpid()}"
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(temporary, folder / INDEX_FILE)

    @classmethod
    def load(cls, folder: Path) -> Index:
        """Raises FileNotFoundError, and ValueError naming a file that is damaged."""
        path = folder / INDEX_FILE
        try:
            values = json.loads(path.read_text())
            return cls(**{field.name: values[field.name] for field in fields(cls)})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {type(error).__name__} {error}") from None

    def check_restart(self, other: Index, folder: Path) -> None:
        """ValueError naming the first setting in which `other` cannot go on with these shards."""
        for name, value in asdict(self).items():
            given = getattr(other, name)
            if name in _FREE or value == given:
                continue
            if name in ("samples", "digest"):
                raise ValueError(
                    f"{folder} holds latents of {self.samples} images of {self.source}, which are "
                    "not those of now: choose another --out, or delete it"
                )
            raise ValueError(
                f"{folder} was begun with {name.replace('_', '-')} {value}, got {given}: choose "
                "another --out, or delete it"
            )


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a shard, whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        save_file(dict(tensors), temporary, {"about": json.dumps(about)})
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_about(path: Path) -> dict[str, Any]:
    """The metadata of a shard. Raises ValueError naming a file that is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})["about"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from None


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed command left half-written."""
    for path in folder.glob("*.tmp-*"):
        path.unlink()


def remove(folder: Path) -> None:
    """Delete index and shards, and the folder if there is nothing else in it."""
    shards = [shard_path(folder, number) for number in range(Index.load(folder).shards)]
    for path in (*shards, folder / INDEX_FILE):
        path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
