"""Latents of a folder of images, computed once with a diffusers autoencoder: `tim encode`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from tim.autoencoder import encode, load_autoencoder
from tim.cli import parse


@dataclass(frozen=True)
class Encode:
    """Encode a folder of images (a class for each sub-folder) with an autoencoder of diffusers.
    Writes latents.npz (x [N, C, H, W] float32, y [N]) for `--data.kind arrays --data.path`."""

    images: tyro.conf.Positional[Path]
    """Folder of images."""
    vae: str
    """Autoencoder: a folder saved by diffusers, or a hub id such as stabilityai/sd-vae-ft-ema."""
    out: Path
    """Folder for latents.npz and latents.json."""
    image_size: int = 256
    """Side that images are cropped and resized to, in pixels."""
    batch_size: int = 16
    """Images per pass of the autoencoder."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def main(arguments: list[str]) -> int:
    from rich.progress import track

    from tim.data.folder import FolderDataset
    from tim.trainer import pick_device

    command = parse(Encode, "tim encode", arguments)
    if command.image_size < 1 or command.batch_size < 1:
        raise ValueError(
            "image-size and batch-size must be at least 1, "
            f"got {command.image_size} and {command.batch_size}"
        )
    if command.out.exists() and not command.out.is_dir():
        raise ValueError(f"out must be a folder, got the file {command.out}")
    dataset = FolderDataset(command.images, command.image_size, cache_bytes=0)
    device = pick_device(command.device)
    vae = load_autoencoder(command.vae, device=device)
    rng = np.random.default_rng(0)
    latents, labels = [], []
    starts = range(0, len(dataset), command.batch_size)
    for start in track(starts, "encoding", disable=not os.isatty(2)):
        indices = np.arange(start, min(start + command.batch_size, len(dataset)))
        # An unreadable file is replaced by its neighbour when training; latents leave it out.
        batch = dataset.batch(indices, rng)
        readable = [dataset.files[i] not in dataset.skipped for i in indices]
        latents.append(encode(vae, batch.x[readable].to(device)).cpu().numpy())
        labels.append(batch.y[readable].numpy())
    x, y = np.concatenate(latents), np.concatenate(labels)
    save(command, x, y, dataset.classes, dataset.skipped)
    for name, reason in dataset.skipped.items():
        print(f"skipped {name}: {reason}")
    print(f"{len(x)} latents of shape {list(x.shape[1:])}, {len(dataset.skipped)} files skipped")
    print(command.out / "latents.npz")
    return 0


def save(
    command: Encode, x: np.ndarray, y: np.ndarray, classes: list[str], skipped: dict[str, str]
) -> None:
    """latents.npz and its description latents.json, each whole or not at all."""
    command.out.mkdir(parents=True, exist_ok=True)
    about = {
        "vae": command.vae,
        "image_size": command.image_size,
        "classes": classes,
        "skipped": skipped,
    }
    temporary = command.out / f"latents.tmp-{os.getpid()}"
    with temporary.open("wb") as file:
        np.savez(file, x=x, y=y)
    os.replace(temporary, command.out / "latents.npz")
    temporary.write_text(json.dumps(about, indent=1) + "\n")
    os.replace(temporary, command.out / "latents.json")
