"""Where in tar files of the WebDataset layout the samples lie.

Headers are read once; what they say is kept beside the tar files in .tim-index/NAME.npz (below the
user's cache directory where that cannot be written), so that any sample can be read on its own, by
any process, without a pass over the files.
"""

from __future__ import annotations

import hashlib
import os
import random
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tim.data.folder import SUFFIXES

#: Of the layout of index files; others are made anew.
VERSION = 1
FOLDER = ".tim-index"
#: Columns of `TarIndex.places`.
IMAGE, LABEL, TEXT = range(3)
#: In `TarIndex.labels`: the label has to be read from the file.
UNREAD = -1
_BLOCK = 512


@dataclass(frozen=True)
class TarIndex:
    """The samples of one tar file, those with an image, in the order of their first entries."""

    path: Path
    #: Their stems, joined by zero bytes: a string for each of millions of samples is too much.
    stems: bytes
    #: [n, 3, 2] int64: offset and size of image, label and text; size -1 where there is none.
    places: np.ndarray
    #: [n] int64: 0 without a label, `UNREAD` for one that is no whole number.
    labels: np.ndarray
    #: Why entries after these cannot be found; empty for a file that is whole.
    damage: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def stem(self, row: int) -> str:
        start = self._ends[row - 1] + 1 if row > 0 else 0
        return self.stems[start : self._ends[row]].decode(errors="surrogateescape")

    @cached_property
    def _ends(self) -> np.ndarray:
        """[n], where each stem ends: to split all of them for one would take too long."""
        zeros = np.flatnonzero(np.frombuffer(self.stems, np.uint8) == 0)
        return np.append(zeros, len(self.stems))


def read_indices(tars: list[Path]) -> list[TarIndex]:
    """The index of each file, from disk where it is kept there and the file is as it was.

    Raises ValueError for a file that is no uncompressed tar file.
    """
    # Processes that begin at different files find each other's work when they come to it.
    start = random.Random().randrange(len(tars))
    with ThreadPoolExecutor(8, "tim-index") as pool:
        found = list(pool.map(read_index, [*tars[start:], *tars[:start]]))
    return [*found[len(tars) - start :], *found[: len(tars) - start]]


def read_index(tar: Path) -> TarIndex:
    """The index of one file, see `read_indices`."""
    status = tar.stat()
    stamp = np.array([VERSION, status.st_size, status.st_mtime_ns])
    caches = _caches(tar)
    for cache in caches:
        if (kept := _load(cache, tar, stamp)) is not None:
            return kept
    made = scan(tar)
    for cache in caches:
        try:
            _save(cache, made, stamp)
            break
        except OSError:  # read-only or full: the next place, or none
            continue
    return made


def _caches(tar: Path) -> list[Path]:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = hashlib.sha256(os.fsencode(tar.parent.resolve())).hexdigest()[:16]
    name = f"{tar.name}.npz"
    return [tar.parent / FOLDER / name, home / "tim" / "index" / folder / name]


def _load(cache: Path, tar: Path, stamp: np.ndarray) -> TarIndex | None:
    try:
        with np.load(cache, allow_pickle=False) as kept:
            if not np.array_equal(kept["stamp"], stamp):
                return None
            stems, damage = kept["stems"].tobytes(), str(kept["damage"])
            return TarIndex(tar, stems, kept["places"], kept["labels"], damage)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _save(cache: Path, index: TarIndex, stamp: np.ndarray) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_name(f"{cache.name}.tmp-{os.getpid()}-{random.getrandbits(32):08x}")
    try:
        with temporary.open("wb") as file:
            np.savez(
                file,
                stamp=stamp,
                stems=np.frombuffer(index.stems, np.uint8),
                places=index.places,
                labels=index.labels,
                damage=index.damage,
            )
        os.replace(temporary, cache)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def scan(tar: Path) -> TarIndex:
    """The index of one file, from its headers; ValueError when the first of them is none."""
    entries: dict[str, dict[str, tuple[int, int]]] = {}
    damage, end = "", 0
    try:
        if tar.stat().st_size == 0:
            return TarIndex(tar, b"", *_empty(), "the file is empty")
        with tarfile.open(tar, "r:") as archive:
            try:
                while (member := archive.next()) is not None:
                    # It keeps all it has met; of a large file that is much.
                    archive.members.clear()
                    end = archive.offset
                    if not member.isfile():
                        continue
                    folder, base = os.path.split(member.name)
                    stem, _, ending = base.partition(".")
                    place = (member.offset_data, member.size)
                    entries.setdefault(os.path.join(folder, stem), {})[ending.lower()] = place
            except tarfile.TarError as error:
                damage = f"damaged at byte {end}: {error}"
    except tarfile.TarError as error:
        raise ValueError(f"{tar} is no uncompressed tar file: {error}") from None
    with tar.open("rb") as file:
        # tarfile takes a header that it cannot read for the end of the file, if it is not the first
        file.seek(end)
        if not damage and file.read(_BLOCK).strip(b"\0"):
            damage = f"damaged at byte {end}: there is no header"
        size = file.seek(0, os.SEEK_END)
        stems, places, labels = [], [], []
        for stem, parts in entries.items():
            parts = {ending: (at, n) for ending, (at, n) in parts.items() if at + n <= size}
            image = next((p for ending, p in parts.items() if f".{ending}" in SUFFIXES), None)
            if image is None:
                continue
            label = parts.get("cls")
            stems.append(os.fsencode(stem))
            places.append((image, label or (0, -1), parts.get("txt") or parts.get("json", (0, -1))))
            labels.append(0 if label is None else _number(file, *label))
    if not stems:
        return TarIndex(tar, b"", *_empty(), damage)
    return TarIndex(
        tar, b"\0".join(stems), np.array(places, np.int64), np.array(labels, np.int64), damage
    )


def _empty() -> tuple[np.ndarray, np.ndarray]:
    return np.empty((0, 3, 2), np.int64), np.empty(0, np.int64)


def _number(file: BinaryIO, offset: int, size: int) -> int:
    file.seek(offset)
    try:
        return int(file.read(size))
    except ValueError:
        return UNREAD
