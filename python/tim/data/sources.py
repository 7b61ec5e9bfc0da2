"""Where images to be encoded come from: a folder, or tar files in the WebDataset layout.

A source is a list of samples in a fixed order, each with a name, its image file and what is known
of it: a label, captions.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tim.data.folder import image_files, list_images, load_image
from tim.data.tars import UNREAD, TarIndex, read_indices

SIDECAR = "txt"


@dataclass(frozen=True)
class Part:
    """A file, or the part of one in which the bytes of interest lie."""

    path: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        if self.size is None:
            return self.path.read_bytes()
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise OSError(f"{self.path} ends within the entry at byte {self.offset}")
        return data


@dataclass(frozen=True)
class Sample:
    """An image and what belongs to it; text stays on disk until it is asked for."""

    name: str
    image: Part
    label: int | Part = 0
    captions: Part | tuple[str, ...] = ()

    def pixels(self, size: int | tuple[int, int], channels: int = 3) -> np.ndarray:
        """uint8 [channels, H, W], see `load_image`; raises what Pillow raises."""
        return load_image(io.BytesIO(self.image.read()), size, channels)

    def class_number(self) -> int:
        if isinstance(self.label, int):
            return self.label
        text = self.label.read().decode()
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"the label must be a whole number, got {text!r:.40}") from None

    def texts(self) -> list[str]:
        """Captions of the image, at least one; ValueError when there is none."""
        if isinstance(self.captions, Part):
            raw = self.captions.read().decode()
            found = [raw.strip()]
            if self.captions.path.suffix == ".json" or raw.lstrip().startswith(("{", "[")):
                found = captions_in(json.loads(raw))
        else:
            found = list(self.captions)
        found = [text for text in found if text]
        if not found:
            raise ValueError("there is no caption")
        return found


def captions_in(record: object) -> list[str]:
    """The captions of a JSON record: a string, a list of them, or a mapping with such an entry."""
    if isinstance(record, dict):
        names = ("captions", "caption", "text", "prompt", "txt")
        record = next((record[name] for name in names if name in record), [])
    values = [record] if isinstance(record, str) else record
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise ValueError(f"captions must be a string or a list of them, got {record!r:.60}")
    return values


class Source:
    """Samples in a fixed order. `classes` holds the names of their labels, if they have any.

    Of samples in tar files, `shards` are the numbers of samples in each, and `damaged` are files
    with the reason why entries in them cannot be found.
    """

    def __init__(
        self,
        samples: Iterable[Sample],
        classes: Sequence[str] = (),
        shards: Sequence[int] | None = None,
        damaged: Mapping[str, str] | None = None,
    ) -> None:
        self.samples = samples if isinstance(samples, TarSamples) else list(samples)
        self.classes, self.shards, self.damaged = list(classes), shards, dict(damaged or {})

    def __len__(self) -> int:
        return len(self.samples)


class TarSamples(Sequence[Sample]):
    """The samples of tar files one after the other, made as they are asked for."""

    def __init__(self, tars: Sequence[TarIndex], captions: bool) -> None:
        self.tars, self.captions = list(tars), captions
        self.ends = np.cumsum([len(tar) for tar in self.tars])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:  # type: ignore[override]
        if isinstance(index, slice):
            return [self._sample(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} samples, got index {index}")
        return self._sample(index % len(self))

    def _sample(self, index: int) -> Sample:
        number = int(np.searchsorted(self.ends, index, side="right"))
        tar = self.tars[number]
        row = index - int(self.ends[number]) + len(tar)
        image, label, text = (
            Part(tar.path, int(offset), int(size)) if size >= 0 else None
            for offset, size in tar.places[row]
        )
        known = int(tar.labels[row])
        return Sample(
            f"{tar.path.name}/{tar.stem(row)}",
            image,  # type: ignore[arg-type]
            label if label and known == UNREAD else known,
            (text or ()) if self.captions else (),
        )

    def labels(self) -> np.ndarray:
        """[N], `UNREAD` for those that are no whole numbers."""
        return np.concatenate([tar.labels for tar in self.tars])


def open_source(path: str | Path, captions: str | None = None) -> Source:
    """The images in `path`.

    Args:
        path: a folder of images, a class for each sub-folder; or a .tar file, or a folder of them,
            in the WebDataset layout: entries of one stem are one sample, with an image and a label
            (.cls) or captions (.txt, or .json with an entry caption).
        captions: None: labels. "txt": of each image the .txt file beside it (in a tar: .txt or
            .json). Else a .jsonl file, found by its path or in the folder, with a record for each
            image: file_name (or image_file), relative to the folder, and text, caption or captions;
            label, a whole number, if there is one.

    Raises:
        FileNotFoundError, ValueError: nothing is there, or not what it should be (the file is
            named).
    """
    path = Path(path)
    tars = [path] if path.suffix == ".tar" else sorted(path.glob("*.tar")) if path.is_dir() else []
    if tars:
        return _tar_source(tars, captions)
    if captions not in (None, SIDECAR):
        return _listed_source(path, Path(captions))
    if captions:
        files = [path / name for name in image_files(path)]
        return Source(
            Sample(str(file.relative_to(path)), Part(file), captions=Part(file.with_suffix(".txt")))
            for file in files
        )
    files, labels, classes = list_images(path)
    samples = [Sample(n, Part(path / n), y) for n, y in zip(files, labels, strict=True)]
    return Source(samples, classes)


def _listed_source(folder: Path, listing: Path) -> Source:
    given = listing
    if not listing.is_file():
        listing = folder / listing
    if not listing.is_file():
        raise FileNotFoundError(
            f"captions must be 'txt' or a .jsonl file, got {given}, which is neither there nor in "
            f"{folder}"
        )
    samples = []
    with listing.open() as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                name = record.get("file_name") or record["image_file"]
                texts = tuple(captions_in(record))
                label = int(record.get("label", 0))
            except (ValueError, KeyError, AttributeError, TypeError):
                raise ValueError(
                    f"{listing}:{number} must be a JSON record with file_name and caption, "
                    f"got {line.strip()!r:.60}"
                ) from None
            samples.append(Sample(name, Part(folder / name), label, texts))
    if not samples:
        raise ValueError(f"{listing} lists no images")
    return Source(samples)


def _tar_source(tars: list[Path], captions: str | None) -> Source:
    """Samples of uncompressed tar files; of those that are new, the headers are read."""
    if captions not in (None, SIDECAR):
        raise ValueError(
            f"captions of tar files are entries in them: captions 'txt', got {captions}"
        )
    indices = read_indices(tars)
    samples = TarSamples(indices, captions is not None)
    damaged = {tar.path.name: tar.damage for tar in indices if tar.damage}
    if not len(samples):
        told = "".join(f"; {name}: {damage}" for name, damage in list(damaged.items())[:1])
        raise ValueError(f"{tars[0].parent} holds tar files without images{told}")
    return Source(samples, shards=[len(tar) for tar in indices], damaged=damaged)
