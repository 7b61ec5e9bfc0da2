"""Images with captions, or in tar files of the WebDataset layout, decoded as they are used."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tim.data.dataset import Batch, Dataset, to_float
from tim.data.sources import Sample, open_source

EVERY_ROW = slice(None)


class ImageDataset(Dataset):
    """The images of a source (`tim.data.sources.open_source`) with their labels or captions.

    Images are cropped at the centre and resized to `image_size`, and mirrored with probability
    `flip`; of several captions one is drawn. A sample that cannot be read is noted in `skipped`
    when it is met, and the next readable one takes its place.

    Raises FileNotFoundError, ValueError: nothing is there, or nothing that can be read.
    """

    prefetch = 2

    def __init__(
        self,
        path: str | Path,
        image_size: int,
        channels: int = 3,
        flip: float = 0.0,
        workers: int = 4,
        captions: str | None = None,
    ) -> None:
        self.path, self.flip = Path(path), flip
        self.source = open_source(path, captions)
        self.captioned = captions is not None
        self.shape = (channels, image_size, image_size)
        # Pillow refuses very large pictures as a guard against hostile uploads; these are the
        # user's.
        Image.MAX_IMAGE_PIXELS = None
        self._pool = ThreadPoolExecutor(workers, "tim-decode")
        self._lock = threading.Lock()
        self._skipped: dict[int, str] = {}
        self._readable(0)
        self.num_classes = 0 if self.captioned else self._count_classes()

    def __len__(self) -> int:
        return len(self.source)

    @property
    def skipped(self) -> dict[str, str]:
        with self._lock:
            return {self.source.samples[i].name: why for i, why in sorted(self._skipped.items())}

    def batch(
        self, indices: np.ndarray, rng: np.random.Generator, rows: np.ndarray | slice = EVERY_ROW
    ) -> Batch:
        mirrored = torch.from_numpy(rng.random(len(indices)) < self.flip)[rows]
        drawn = rng.random(len(indices))[rows]
        pixels, conditions = zip(
            *self._pool.map(self._readable, indices[rows].tolist()), strict=True
        )
        x = to_float(torch.from_numpy(np.stack(pixels)))
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        if not self.captioned:
            return Batch(x, torch.tensor(conditions))
        texts = [t[int(share * len(t))] for t, share in zip(conditions, drawn, strict=True)]
        return Batch(x, texts)

    def _readable(self, index: int) -> tuple[np.ndarray, Any]:
        """Pixels and condition of the first readable sample from `index` on."""
        count = len(self.source)
        for candidate in [*range(index, count), *range(index)]:
            if candidate not in self._skipped and (found := self._read(candidate)) is not None:
                return found
        name, reason = next(iter(self.skipped.items()))
        raise ValueError(f"none of the {count} images in {self.path} can be read; {name}: {reason}")

    def _read(self, index: int) -> tuple[np.ndarray, Any] | None:
        sample = self.source.samples[index]
        try:
            return sample.pixels(self.shape[1], self.shape[0]), self._condition(sample)
        # Decoders raise whatever they stumble over in a damaged file; no kind of it may end the
        # run.
        except Exception as error:
            with self._lock:
                self._skipped[index] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return None

    def _condition(self, sample: Sample) -> Any:
        return sample.texts() if self.captioned else sample.class_number()

    def _count_classes(self) -> int:
        if self.source.classes:
            return len(self.source.classes)

        def label(sample: Sample) -> int:
            try:
                return sample.class_number()
            except (ValueError, OSError):
                return 0  # told when it is met

        return 1 + max(self._pool.map(label, self.source.samples))
