"""Images in array files: an .npz archive, or an idx pair such as the files of MNIST."""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np

from tim.data.dataset import ArrayDataset

#: Names under which images and labels are looked for in an .npz file.
NPZ_NAMES = {
    "train": [("x", "y"), ("images", "labels"), ("x_train", "y_train")],
    "test": [("x_test", "y_test"), ("images_test", "labels_test")],
}
IDX_PREFIXES = {"train": "train", "test": "t10k"}
IDX_UBYTE = 0x08


def arrays(path: str | Path, split: str = "train", flip: float = 0.0) -> ArrayDataset:
    """The images and labels in `path`.

    `path` is one of
    - an .npz file with images and labels under the names x and y, images and labels, or x_train and
      y_train ("test" split: x_test and y_test, or images_test and labels_test). Images are uint8
      [N, H, W], [N, H, W, C] or [N, C, H, W], C = 1 or 3, scaled to [-1, 1]; or floats
      [N, C, H, W], taken as they are (latents). Labels are whole numbers [N]; without labels all
      images are of one class.
    - a folder with train-images-idx3-ubyte and train-labels-idx1-ubyte ("test" split: t10k-...),
      each plain or .gz; or the file of the images itself, beside which the labels lie.

    Raises FileNotFoundError, and ValueError or TypeError naming the file for anything else in it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"data.path: {path} does not exist")
    if path.suffix == ".npz":
        images, labels = _read_npz(path, split)
    else:
        images, labels = _read_idx_pair(path, split)
    images = _channels_first(images, path)
    labels = _checked_labels(labels, images, path)
    return ArrayDataset(images, labels, int(labels.max()) + 1, flip)


def _read_npz(path: Path, split: str) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            for images, labels in NPZ_NAMES[split]:
                if images in archive:
                    return archive[images], archive.get(labels)
            found = ", ".join(archive.files) or "nothing"
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as an .npz file: {error}") from None
    names = " or ".join(images for images, _ in NPZ_NAMES[split])
    raise ValueError(f"{path} must hold an array {names} for the {split} split, got {found}")


def _read_idx_pair(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    if path.is_dir():
        image_path = _idx_file(path, f"{IDX_PREFIXES[split]}-images", "idx3-ubyte")
    elif "images" in path.name and "idx3" in path.name:
        image_path = path
        if split == "test":
            image_path = _idx_file(path.parent, f"{IDX_PREFIXES[split]}-images", "idx3-ubyte")
    else:
        raise ValueError(
            f"{path} must be an .npz file, a folder with an idx pair, or a file named like "
            "train-images-idx3-ubyte"
        )
    stem = image_path.name.split("images")[0]
    label_path = _idx_file(image_path.parent, f"{stem}labels", "idx1-ubyte")
    return read_idx(image_path, 3), read_idx(label_path, 1)


def _idx_file(folder: Path, stem: str, kind: str) -> Path:
    names = [f"{stem}{dot}{kind}{ending}" for dot in "-." for ending in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} must hold {names[0]} (or {names[1]})")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The unsigned bytes in idx file `path` (plain or .gz) as an array of so many dimensions.

    Raises ValueError when the header says something else or the file's length does not fit it.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked: {error}") from None
    header = 4 + 4 * dimensions
    if len(data) < header or data[:2] != b"\0\0" or data[2] != IDX_UBYTE or data[3] != dimensions:
        raise ValueError(
            f"{path} must start with the idx header 0000 08 {dimensions:02x} (unsigned bytes, "
            f"{dimensions} dimensions), got {data[:4].hex(' ') or 'an empty file'}"
        )
    shape = np.frombuffer(data, ">u4", dimensions, 4).astype(int).tolist()
    expected = header + math.prod(shape)
    if len(data) != expected:
        raise ValueError(f"{path} must have {expected} bytes for shape {shape}, got {len(data)}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _channels_first(images: np.ndarray, path: Path) -> np.ndarray:
    """Images as [N, C, H, W], dtype uint8 or float32."""
    shape = list(images.shape)
    if 0 in shape:
        raise ValueError(f"{path}: there are no images, the array has shape {shape}")
    if images.dtype.kind == "f":
        if images.ndim != 4:
            raise ValueError(f"{path}: float images must have shape [N, C, H, W], got {shape}")
        if not np.isfinite(images).all():
            raise ValueError(f"{path}: the images hold values that are not finite")
        return images.astype(np.float32)
    if images.dtype != np.uint8:
        raise TypeError(f"{path}: images must be uint8 or floats, got {images.dtype}")
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return images.transpose(0, 3, 1, 2)
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return images
    raise ValueError(
        f"{path}: images must have shape [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1 or 3, "
        f"got {shape}"
    )


def _checked_labels(labels: np.ndarray | None, images: np.ndarray, path: Path) -> np.ndarray:
    if labels is None:
        return np.zeros(len(images), dtype=np.int64)
    if labels.dtype.kind not in "iu":
        raise TypeError(f"{path}: labels must be whole numbers, got {labels.dtype}")
    if labels.shape != (len(images),):
        raise ValueError(
            f"{path}: labels must have shape [{len(images)}] like the images, "
            f"got {list(labels.shape)}"
        )
    if labels.min() < 0:
        raise ValueError(f"{path}: labels must not be negative, got {labels.min()}")
    return labels
