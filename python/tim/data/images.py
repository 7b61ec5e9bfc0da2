"""Images with captions, or in tar files of the WebDataset layout, decoded as they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tim.data.dataset import EVERY_ROW, Batch, Rows, to_float
from tim.data.feature_files import FeatureFiles
from tim.data.files import FileDataset
from tim.data.sources import Sample, TarSamples, open_source
from tim.data.tars import UNREAD


class ImageDataset(FileDataset):
    """The images of a source (`tim.data.sources.open_source`) with their labels or captions.

    Images are cropped at the centre and resized to `image_size`, and mirrored with probability
    `flip`; of several captions one is drawn; `features` bring those of each image. A damaged tar
    file counts as `skipped` from there on.

    Raises FileNotFoundError, ValueError: nothing is there, or nothing that can be read.
    """

    def __init__(
        self,
        path: str | Path,
        image_size: int,
        channels: int = 3,
        flip: float = 0.0,
        workers: int = 4,
        captions: str | None = None,
        features: FeatureFiles | None = None,
    ) -> None:
        super().__init__(workers)
        self.path, self.flip = Path(path), flip
        self.source = open_source(path, captions)
        self.shards = self.source.shards
        self.captioned = captions is not None
        self.features, self.has_features = features, features is not None
        self.shape = (channels, image_size, image_size)
        # Told now, and not by the first step of a run that has its directory already.
        self._readable(0)
        self.num_classes = 0 if self.captioned else self._count_classes()

    def __len__(self) -> int:
        return len(self.source)

    def name_of(self, index: int) -> str:
        return self.source.samples[index].name

    @property
    def skipped(self) -> dict[str, str]:
        return {**self.source.damaged, **super().skipped}

    def batch(self, indices: np.ndarray, rng: np.random.Generator, rows: Rows = EVERY_ROW) -> Batch:
        mirrored = torch.from_numpy(rng.random(len(indices)) < self.flip)[rows]
        drawn = rng.random(len(indices))[rows]
        loaded = self._load_all(indices[rows].tolist())
        pixels, conditions, both = zip(*(found for _, found in loaded), strict=True)
        x = to_float(torch.from_numpy(np.stack(pixels)))
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        features = None
        if self.has_features:
            sides = zip(both, mirrored.tolist(), strict=True)
            features = torch.stack([of[int(side)].float() for of, side in sides])
        if not self.captioned:
            return Batch(x, torch.tensor(conditions), features)
        texts = [t[int(share * len(t))] for t, share in zip(conditions, drawn, strict=True)]
        return Batch(x, texts, features)

    def _load(self, index: int) -> tuple[np.ndarray, Any, Tensor | None]:
        """Pixels, label or captions, and features as it is and mirrored."""
        sample = self.source.samples[index]
        condition = sample.texts() if self.captioned else sample.class_number()
        features = self.features.read(sample.name) if self.features else None
        return sample.pixels(self.shape[1], self.shape[0]), condition, features

    def _count_classes(self) -> int:
        if self.source.classes:
            return len(self.source.classes)
        samples = self.source.samples
        if isinstance(samples, TarSamples) and (labels := samples.labels()).min() > UNREAD:
            return 1 + int(labels.max())

        def label(sample: Sample) -> int:
            try:
                return sample.class_number()
            except (ValueError, OSError):
                return 0  # told when it is met

        return 1 + max(map(label, samples))
