"""Reference images and statistics: .npz files, folders, or the data of a run."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from tim.data import Dataset
from tim.data.folder import image_files, load_image

WORKERS = 4


class Images:
    """Reference images; `batches` gives them as uint8 [B, C, H, W]."""

    #: What there is of it on disk, to tell a cached result by.
    identity: tuple[object, ...]

    def __len__(self) -> int:
        raise NotImplementedError

    def batches(self, size: int) -> Iterator[Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class Reference:
    """Images, or the moments of the features of images, or both."""

    name: str
    identity: tuple[object, ...]
    images: Images | None
    mean: Tensor | None = None
    covariance: Tensor | None = None


def open_reference(path: str | Path, shape: tuple[int, int], limit: int | None) -> Reference:
    """The reference in `path`.

    Args:
        path: an .npz file in the form of the ADM suite, with mu and sigma, with images arr_0 (uint8
            [N, H, W, 3]), or with both; or a folder of images.
        shape: height and width that images of a folder are cropped and resized to.
        limit: take so many images at most, spread evenly.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: there is something else.
    """
    path = Path(path)
    if path.is_dir():
        images = FolderImages(path, shape, limit)
        return Reference(str(path), images.identity, images)
    if not path.is_file():
        raise FileNotFoundError(f"reference: {path} does not exist")
    if path.suffix != ".npz":
        raise ValueError(f"reference must be an .npz file or a folder of images, got {path}")
    names = _names(path)
    if "mu" not in names and "arr_0" not in names:
        raise ValueError(
            f"reference {path} must hold mu and sigma, or images arr_0, got "
            f"{', '.join(names) or 'nothing'}"
        )
    images = NpzImages(path, limit) if "arr_0" in names else None
    identity = (*_stamp(path), limit)
    if "mu" not in names:
        return Reference(str(path), identity, images)
    if "sigma" not in names:
        raise ValueError(f"reference {path} holds mu and no sigma")
    return Reference(str(path), identity, images, *_moments(path))


class NpzImages(Images):
    """arr_0 of an .npz file, read in parts: such files hold gigabytes."""

    def __init__(self, path: Path, limit: int | None) -> None:
        self.path = path
        with _npz(path) as archive, archive.open("arr_0.npy") as file:
            self.shape = _header(file, path)
        self.chosen = _spread(self.shape[0], limit)
        self.identity = ("npz", *_stamp(path), limit)

    def __len__(self) -> int:
        return len(self.chosen)

    def batches(self, size: int) -> Iterator[Tensor]:
        bytes_each = int(np.prod(self.shape[1:]))
        with _npz(self.path) as archive, archive.open("arr_0.npy") as file:
            _header(file, self.path)
            at, kept = 0, []
            for index in self.chosen:
                _skip(file, (index - at) * bytes_each)
                data = file.read(bytes_each)
                if len(data) < bytes_each:
                    raise ValueError(f"reference {self.path} ends within image {index} of arr_0")
                at = index + 1
                kept.append(np.frombuffer(data, np.uint8).reshape(self.shape[1:]))
                if len(kept) == size:
                    yield _channels_first(kept)
                    kept = []
            if kept:
                yield _channels_first(kept)


class FolderImages(Images):
    """The images below a folder, cropped at the centre and resized."""

    def __init__(self, path: Path, shape: tuple[int, int], limit: int | None) -> None:
        files = image_files(path)
        self.path, self.shape = path, shape
        self.files = [path / files[i] for i in _spread(len(files), limit)]
        newest = max(file.stat().st_mtime_ns for file in self.files)
        self.identity = ("folder", str(path.resolve()), len(files), newest, shape, limit)

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, size: int) -> Iterator[Tensor]:
        with ThreadPoolExecutor(WORKERS, "tim-decode") as pool:
            for start in range(0, len(self.files), size):
                pixels = pool.map(self._load, self.files[start : start + size])
                yield torch.from_numpy(np.stack(list(pixels)))

    def _load(self, file: Path) -> np.ndarray:
        try:
            return load_image(file, self.shape)
        # Decoders raise whatever they stumble over in a damaged file.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"reference: {file} cannot be read: {reason}") from None


class DatasetImages(Images):
    """Images of a data set, not mirrored."""

    def __init__(self, dataset: Dataset, limit: int | None, identity: tuple[object, ...]) -> None:
        self.dataset, self.chosen = dataset, _spread(len(dataset), limit)
        self.identity = ("data", *identity, len(dataset), limit)

    def __len__(self) -> int:
        return len(self.chosen)

    def batches(self, size: int) -> Iterator[Tensor]:
        for start in range(0, len(self.chosen), size):
            rows = np.array(self.chosen[start : start + size])
            x = self.dataset.batch(rows, np.random.default_rng(0)).x
            yield self.dataset.decode(x).permute(0, 3, 1, 2)


def _spread(count: int, limit: int | None) -> list[int]:
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]


def _stamp(path: Path) -> tuple[str, int, int]:
    return str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns


def _npz(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"reference {path} cannot be read as an .npz file: {error}") from None


def _names(path: Path) -> list[str]:
    with _npz(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def _header(file: BinaryIO, path: Path) -> tuple[int, ...]:
    """Shape of the images that follow; the file is left at the first of them."""
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, fortran, dtype = read[version](file)
    except (ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"reference {path}: arr_0 cannot be read: {error}") from None
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise ValueError(
            f"reference {path}: arr_0 must be uint8 [N, H, W, 3], got {dtype} {list(shape)}"
        )
    return shape


def _skip(file: BinaryIO, count: int) -> None:
    while count > 0:
        read = len(file.read(min(count, 1 << 24)))
        if not read:
            return
        count -= read


def _channels_first(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def _moments(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            mean, covariance = archive["mu"], archive["sigma"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"reference {path}: mu and sigma cannot be read: {error}") from None
    if mean.ndim != 1 or covariance.shape != (len(mean),) * 2:
        raise ValueError(
            f"reference {path}: mu and sigma must have shapes [D] and [D, D], "
            f"got {list(mean.shape)} and {list(covariance.shape)}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"reference {path}: mu or sigma hold values that are not finite")
    return torch.from_numpy(mean).double(), torch.from_numpy(covariance).double()
