"""What was computed of samples so far, in files that are there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

#: Samples in a file: what a killed run has to do again at most.
SHARD = 1024


class Shards:
    """Rows 0 .. total - 1 of named arrays, `SHARD` of them to a file in `folder`."""

    def __init__(self, folder: Path, total: int, size: int = SHARD) -> None:
        self.folder, self.total, self.size = folder, total, size

    def __len__(self) -> int:
        return -(-self.total // self.size)

    def rows(self, number: int) -> range:
        """The rows in file `number`."""
        return range(number * self.size, min((number + 1) * self.size, self.total))

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.npz"

    def missing(self) -> list[int]:
        return [number for number in range(len(self)) if not self.path(number).is_file()]

    def write(self, number: int, arrays: dict[str, np.ndarray]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.path(number), lambda path: _save(path, arrays))

    def read(self, name: str) -> Iterator[np.ndarray]:
        """The parts of an array, in order."""
        for number in range(len(self)):
            with np.load(self.path(number)) as arrays:
                yield arrays[name]

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def write_whole(path: Path, save: Callable[[Path], Any]) -> None:
    """Have `save` write to a temporary name beside `path`, and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        save(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left half-written below `folder`."""
    for path in folder.rglob(".*.tmp-*"):
        path.unlink(missing_ok=True)


def write_samples(
    path: Path, shape: tuple[int, int, int, int], parts: Iterable[np.ndarray]
) -> None:
    """An .npz file as the ADM suite reads it: `arr_0`, uint8 [N, H, W, 3], from parts of it.

    The parts are written as they come, so that the samples need not fit into memory.

    Raises ValueError when they are not of that dtype and shape.
    """

    def save(temporary: Path) -> None:
        rows = 0
        with (
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as file,
        ):
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                if part.dtype != np.uint8 or part.shape[1:] != shape[1:]:
                    raise ValueError(
                        f"samples must be uint8 of shape [N, {', '.join(map(str, shape[1:]))}], "
                        f"got {part.dtype} {list(part.shape)}"
                    )
                file.write(np.ascontiguousarray(part).tobytes())
                rows += len(part)
        if rows != shape[0]:
            raise ValueError(f"there must be {shape[0]} samples, got {rows}")

    write_whole(path, save)


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)
