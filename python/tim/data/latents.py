"""Latents computed beforehand: shards of `tim encode`, and the layout of the public code."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tim.autoencoder import decode, load_autoencoder
from tim.data.dataset import Batch, Dataset, to_uint8
from tim.data.feature_files import FeatureFiles
from tim.data.shards import INDEX_FILE, Index, read_about, shard_path

EVERY_ROW = slice(None)


def open_latents(
    path: str | Path,
    flip: float = 0.5,
    packed: bool = False,
    features: FeatureFiles | None = None,
) -> Dataset:
    """The latents in a folder: shards of `tim encode`, or one .safetensors file for each image.

    Raises FileNotFoundError for a path that is no folder, ValueError for anything else in it, or
    when files for each image, which are of one size, are to be packed.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"data.path: {path} is not a folder")
    if (path / INDEX_FILE).is_file():
        if features is not None:
            raise ValueError(
                f"data.feature_files must be None for shards of tim encode, which bring features "
                f"of tim encode --features, got {features.path}"
            )
        return LatentShards(path, flip, packed)
    if packed:
        raise ValueError(f"data.pack needs shards of tim encode, got other files in {path}")
    return LatentFiles(path, flip, features)


class LatentShards(Dataset):
    """The shards that `tim encode` wrote to `path`, mapped into memory and read as they are used.

    Of each image the mirrored latents are taken with probability `flip`. Labels, or captions, of
    which one is drawn, and features come with them.

    Batches are of images of one size, or `packed`, lists of any sizes.

    Attributes:
        index: what they were encoded with.
        sizes: heights and widths of the latents that occur.
        size_of: [N], number in `sizes` of each image.

    Raises ValueError when shards are missing or damaged, or empty.
    """

    prefetch = 2

    def __init__(self, path: str | Path, flip: float = 0.5, packed: bool = False) -> None:
        self.path, self.flip, self.packed = Path(path), flip, packed
        self.index = Index.load(self.path)
        self.captioned = self.index.captions is not None
        self._files: dict[int, safe_open] = {}
        self._captions: list[dict[str, list[list[str]] | None]] = []
        self._vae: nn.Module | None = None
        places: list[tuple[int, int, int]] = []  # shard, size, row
        self.sizes: list[tuple[int, int]] = []
        for number in range(self.index.shards):
            file = shard_path(self.path, number)
            if not file.is_file():
                raise ValueError(
                    f"{file} is missing: {self.path} is not whole, give its tim encode command "
                    "again"
                )
            groups = read_about(file)["groups"]
            self._captions.append({name: group.get("captions") for name, group in groups.items()})
            for name, group in groups.items():
                size = tuple(map(int, name.split("x")))
                if size not in self.sizes:
                    self.sizes.append(size)
                places += [(number, self.sizes.index(size), i) for i in range(len(group["names"]))]
        if not places:
            raise ValueError(f"{self.path} holds no latents: none of its images could be read")
        self._places = np.array(places)
        self.shards = np.bincount(self._places[:, 0], minlength=self.index.shards).tolist()
        self.size_of = self._places[:, 1]
        self.num_classes = len(self.index.classes) or self._classes_of_labels()
        self.has_features = self.index.features is not None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape [C, H, W] of all latents; ValueError when they are of several sizes."""
        if len(self.sizes) > 1:
            sizes = ", ".join(f"{h}x{w}" for h, w in self.sizes)
            raise ValueError(f"{self.path} holds latents of several sizes: {sizes}")
        return self.index.channels, *self.sizes[0]

    def __len__(self) -> int:
        return len(self._places)

    def batch(
        self, indices: np.ndarray, rng: np.random.Generator, rows: np.ndarray | slice = EVERY_ROW
    ) -> Batch:
        """As `Dataset.batch`, of images of one size unless `packed`. Which caption and which mirror
        image is drawn for all of `indices`, whatever the `rows` asked for."""
        mirrored = (rng.random(len(indices)) < self.flip)[rows].astype(int)
        drawn = rng.random(len(indices))[rows]
        places = self._places[indices[rows]]
        latents, features, conditions = [], [], []
        for (shard, size, row), side, share in zip(places, mirrored, drawn, strict=True):
            height, width = self.sizes[size]
            name, file = f"{height}x{width}", self._file(shard)
            latents.append(_entry(file, f"{name}.latents", row, side))
            if self.has_features:
                features.append(_entry(file, f"{name}.features", row, side))
            if self.captioned:
                texts = self._captions[shard][name][row]
                conditions.append(texts[int(share * len(texts))])
            else:
                conditions.append(int(file.get_slice(f"{name}.labels")[row : row + 1]))
        y = conditions if self.captioned else torch.tensor(conditions)
        if self.packed:
            return Batch(latents, y, features or None)
        return Batch(torch.stack(latents), y, torch.stack(features) if features else None)

    def _classes_of_labels(self) -> int:
        if self.captioned:
            return 0
        names = {f"{h}x{w}.labels" for h, w in self.sizes}
        largest = 0
        for number in range(self.index.shards):
            with safe_open(shard_path(self.path, number), framework="pt") as file:
                for name in names & set(file.keys()):
                    largest = max(largest, int(file.get_tensor(name).max()))
        return 1 + largest

    def _file(self, shard: int) -> safe_open:
        """The shard, open: those that a rank never reads are never opened."""
        if shard not in self._files:
            self._files[shard] = safe_open(shard_path(self.path, shard), framework="pt")
        return self._files[shard]

    def decode(self, x: Tensor) -> Tensor:
        """Pictures of latents, by the autoencoder that encoded them.

        Raises ValueError when it cannot be had.
        """
        if self._vae is None:
            try:
                self._vae = load_autoencoder(self.index.vae)
            except ImportError as error:
                raise ValueError(str(error)) from None
        self._vae.to(x.device)
        try:
            return to_uint8(decode(self._vae, x))
        finally:
            self._vae.to("cpu")


def _entry(file: safe_open, name: str, row: int, side: int) -> Tensor:
    return file.get_slice(name)[row : row + 1, side : side + 1][0, 0].float()


class LatentFiles(Dataset):
    """One file for each image, as the public code's preprocessing writes them.

    `path` holds a folder for each class, with files of `latent` [2, C, H, W] (as it was, and
    mirrored) and `label`. A file that cannot be read, or is of another shape than the first, is
    noted in `skipped` when it is met, and the next one in sorted order takes its place; so is one
    whose `features` cannot be read.

    Raises ValueError when there is no such file.
    """

    prefetch = 2

    def __init__(
        self, path: str | Path, flip: float = 0.5, features: FeatureFiles | None = None
    ) -> None:
        self.path, self.flip = Path(path), flip
        self.features, self.has_features = features, features is not None
        self.files = sorted(
            str(file.relative_to(self.path)) for file in self.path.rglob("*.safetensors")
        )
        if not self.files:
            raise ValueError(
                f"{self.path} must hold shards of tim encode ({INDEX_FILE}) or folders of "
                ".safetensors files, got neither"
            )
        self._lock = threading.Lock()
        self._skipped: dict[int, str] = {}
        self.shape = None  # type: ignore[assignment]
        self.shape = tuple(self._readable(0)[0].shape[1:])
        folders = {Path(file).parts[0] for file in self.files if len(Path(file).parts) > 1}
        self.num_classes = len(folders) or self._classes_of_labels()

    def __len__(self) -> int:
        return len(self.files)

    @property
    def skipped(self) -> dict[str, str]:
        with self._lock:
            return {self.files[i]: reason for i, reason in sorted(self._skipped.items())}

    def batch(
        self, indices: np.ndarray, rng: np.random.Generator, rows: np.ndarray | slice = EVERY_ROW
    ) -> Batch:
        mirrored = (rng.random(len(indices)) < self.flip)[rows].astype(int)
        found = [self._readable(int(index)) for index in indices[rows]]
        latents, labels, features = zip(*found, strict=True)

        def sides(pairs: tuple[Tensor, ...]) -> Tensor:
            return torch.stack([p[side].float() for p, side in zip(pairs, mirrored, strict=True)])

        return Batch(
            sides(latents), torch.tensor(labels), sides(features) if self.has_features else None
        )

    def _readable(self, index: int) -> tuple[Tensor, int, Tensor | None]:
        """Latents, label and features of the first readable file from `index` on."""
        for candidate in [*range(index, len(self.files)), *range(index)]:
            if candidate in self._skipped:
                continue
            try:
                return self._read(candidate)
            except (SafetensorError, OSError, KeyError, ValueError) as error:
                with self._lock:
                    reason = " ".join(str(error).split())
                    self._skipped[candidate] = f"{type(error).__name__}: {reason}"
        first, reason = next(iter(self.skipped.items()))
        raise ValueError(
            f"none of the {len(self.files)} files in {self.path} can be read; {first}: {reason}"
        )

    def _read(self, index: int) -> tuple[Tensor, int, Tensor | None]:
        with safe_open(self.path / self.files[index], framework="pt") as file:
            latent, label = file.get_tensor("latent"), int(file.get_tensor("label"))
        if latent.dim() != 4 or latent.shape[0] != 2 or self.shape not in (None, latent.shape[1:]):
            expected = "[2, C, H, W]" if self.shape is None else [2, *self.shape]
            raise ValueError(f"latent must have shape {expected}, got {list(latent.shape)}")
        return latent, label, self.features.read(self.files[index]) if self.features else None

    def _classes_of_labels(self) -> int:
        """For files that lie in no folders."""
        return 1 + max(self._readable(i)[1] for i in range(len(self.files)))

    def decode(self, x: Tensor) -> Tensor:
        raise ValueError("latents are no pictures: tim sample decodes them")
