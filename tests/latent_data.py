"""Images, tar files and latents for tests of encoding and of training on latents."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

SIZES = {"cats/1.png": (20, 24), "cats/2.png": (16, 16), "dogs/1.png": (30, 18)}


def picture(seed: int, height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def image_folder(path: Path, captions: bool = False) -> Path:
    """Three images in two classes and one file that is no image."""
    for seed, (name, (height, width)) in enumerate(SIZES.items()):
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(seed, height, width).save(file)
        if captions:
            file.with_suffix(".txt").write_text(f"a {name.split('/')[0][:-1]}\n")
    (path / "dogs" / "broken.png").write_bytes(b"not a picture")
    if captions:
        (path / "dogs" / "broken.txt").write_text("a dog")
    return path


def tar_file(path: Path, start: int = 0, count: int = 3) -> Path:
    """WebDataset: image, label and captions of each sample, under one stem."""
    with tarfile.open(path, "w") as archive:
        for i in range(start, start + count):
            stream = io.BytesIO()
            picture(i, 18, 18).save(stream, "png")
            entries = {
                "png": stream.getvalue(),
                "cls": str(i % 2).encode(),
                "json": json.dumps({"captions": [f"picture {i}", f"number {i}"]}).encode(),
            }
            for ending, data in entries.items():
                info = tarfile.TarInfo(f"{i:04d}.{ending}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def public_latents(path: Path, classes: int = 2, each: int = 3, shape=(4, 8, 8)) -> Path:
    """The public code's layout: a folder for each class, a file for each image."""
    generator = torch.Generator().manual_seed(0)
    for label in range(classes):
        folder = path / f"n{label:08d}"
        folder.mkdir(parents=True)
        for i in range(each):
            latent = torch.randn(2, *shape, generator=generator)
            state = {"latent": latent, "label": torch.tensor(float(label))}
            save_file(state, folder / f"n{label:08d}_{i}.safetensors")
    return path
