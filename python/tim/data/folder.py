"""A folder of images, a class for each sub-folder."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from tim.data.dataset import EVERY_ROW, Batch, Rows, flip_some, to_float
from tim.data.files import FileDataset

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"))
GIGABYTE = 10**9


class FolderDataset(FileDataset):
    """The images below `path`, cropped at the centre to a square and resized to `image_size`.

    The class of an image is its sub-folder of `path`, in sorted order; with no sub-folders all
    images are of one class. Decoded images are kept in memory when all of them fit in
    `cache_bytes`.

    Raises FileNotFoundError when `path` is no folder, ValueError when it holds no image that can be
    read, or images both beside and inside sub-folders.
    """

    def __init__(
        self,
        path: str | Path,
        image_size: int,
        channels: int = 3,
        flip: float = 0.0,
        workers: int = 4,
        cache_bytes: int = 2 * GIGABYTE,
    ):
        super().__init__(workers)
        self.path = Path(path)
        self.files, labels, self.classes = list_images(self.path)
        self.labels = torch.tensor(labels)
        self.num_classes = len(self.classes)
        self.shape = (channels, image_size, image_size)
        self.flip = flip
        self._cache: np.ndarray | None = None
        if len(self.files) * channels * image_size**2 <= cache_bytes:
            # Pages are only taken from the system when images are written to them.
            self._cache = np.empty((len(self.files), *self.shape), np.uint8)
        self._cached = np.zeros(len(self.files), bool)
        # Told now, and not by the first step of a run that has its directory already.
        self._readable(0)

    def __getstate__(self) -> dict[str, Any]:
        # One for each worker process would be too many.
        return {**super().__getstate__(), "_cache": None, "_cached": np.zeros_like(self._cached)}

    def __len__(self) -> int:
        return len(self.files)

    def name_of(self, index: int) -> str:
        return self.files[index]

    def batch(self, indices: np.ndarray, rng: np.random.Generator, rows: Rows = EVERY_ROW) -> Batch:
        chosen, pixels = zip(*self._load_all(indices[rows].tolist()), strict=True)
        x = to_float(torch.from_numpy(np.stack(pixels)))
        return Batch(flip_some(x, self.flip, rng, len(indices), rows), self.labels[list(chosen)])

    def _load(self, index: int) -> np.ndarray:
        """Pixels [C, H, W]."""
        if self._cached[index]:
            return self._cache[index]  # type: ignore[index]
        pixels = load_image(self.path / self.files[index], self.shape[1], self.shape[0])
        if self._cache is not None:
            self._cache[index] = pixels
            self._cached[index] = True
        return pixels


def image_files(path: Path) -> list[Path]:
    """Image files below `path`, sorted, relative to it; ValueError when there is none."""
    if not path.is_dir():
        raise FileNotFoundError(f"data.path: {path} is not a folder")
    found = sorted(
        Path(folder, name).relative_to(path)
        for folder, names in _walk(path)
        for name in names
        if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
    )
    if not found:
        raise ValueError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))})")
    return found


def list_images(path: Path) -> tuple[list[str], list[int], list[str]]:
    """Image files below `path` (sorted, relative), the class number of each, the class names."""
    found = image_files(path)
    top = [file.parts[0] if len(file.parts) > 1 else "" for file in found]
    classes = sorted(set(top))
    if "" in classes and len(classes) > 1:
        raise ValueError(
            f"{path} holds images both in sub-folders and beside them ({found[top.index('')]}): "
            "every image must be in the sub-folder of its class, or none"
        )
    number = {name: i for i, name in enumerate(classes)}
    return [str(file) for file in found], [number[name] for name in top], classes


def _walk(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Folders below `path` and their files; a link back to a folder it lies in is not followed."""
    for folder, below, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        below[:] = [
            name
            for name in below
            if not f"{real}{os.sep}".startswith(f"{os.path.realpath(Path(folder, name))}{os.sep}")
        ]
        yield folder, names


def load_image(
    file: str | Path | BinaryIO, size: int | tuple[int, int], channels: int = 3
) -> np.ndarray:
    """Middle of the picture in `file`, upright, on white: uint8 [channels, height, width].

    Args:
        size: height and width, or the side of a square. What of the picture has that aspect ratio
            and is as large as can be is cut out at the centre and resized.

    Raises whatever Pillow raises for a file that is no complete image.
    """
    height, width = (size, size) if isinstance(size, int) else size
    with Image.open(file) as image:
        # JPEG decoders can shrink while decoding; twice the target is left for a clean resize.
        image.draft(None, (2 * max(width, height),) * 2)
        image = ImageOps.exif_transpose(image)
        scale = min(image.width / width, image.height / height)
        w, h = round(scale * width), round(scale * height)
        left, top = (image.width - w) // 2, (image.height - h) // 2
        middle = image.crop((left, top, left + w, top + h))
    middle = _flatten(middle).convert("L" if channels == 1 else "RGB")
    middle = middle.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    pixels = np.asarray(middle).reshape(height, width, channels)
    # Contiguous like a cached image: batches of both must have the same strides.
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def image_size_of(data: bytes) -> tuple[int, int]:
    """Height and width of an upright picture, without decoding it."""
    with Image.open(io.BytesIO(data)) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        width, height = image.size
    return (width, height) if turned else (height, width)


def _flatten(image: Image.Image) -> Image.Image:
    """The image without transparency (on white) and with 8 bits per channel."""
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        # 16-bit grey; Pillow's own conversion to 8 bits clips instead of scaling. Files of
        # 32 bits often hold 8-bit values.
        levels = np.asarray(image).clip(0, 65535)
        scale = 1 if image.mode == "I" and levels.max() <= 255 else 257
        return Image.fromarray((levels // scale).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image)
    return image
