"""What every data set offers to the trainer, and conversions between pixels and model input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tim.images import Images

#: Which images of a batch are wanted, as an index of an array.
Rows: TypeAlias = np.ndarray | slice
EVERY_ROW = slice(None)


class Batch(NamedTuple):
    """Model input `x` [B, C, H, W] float32, labels `y` [B] int64 or a list of captions, and for
    the projection loss features [B, N, z_dim] of an image encoder, or None.

    Packed batches have lists of [C, H_i, W_i] and [N_i, z_dim].
    """

    x: Images
    y: Tensor | list[str]
    features: Images | None = None


class Dataset:
    """Labelled images of one shape.

    Subclasses set `shape` (C, H, W) and `num_classes` and implement `__len__` and `batch`. `batch`
    depends on its arguments only, so that a run can be resumed at any step without replaying it.
    """

    shape: tuple[int, int, int]
    num_classes: int
    #: Batches worth preparing ahead in a background thread: 0 for data that are in memory.
    prefetch: int = 0
    #: Whether batches bring captions in place of labels.
    captioned: bool = False
    #: Whether batches bring features.
    has_features: bool = False
    #: Heights and widths that occur, and which of them each image [N] has, where there are several;
    #: `shape` cannot be asked for then, and a batch is of images of one size unless `packed`.
    sizes: Sequence[tuple[int, int]] = ()
    size_of: np.ndarray | None = None
    #: Whether batches are packed: lists of images of any sizes.
    packed: bool = False
    #: Images in each of the files they lie in one after the other; None: in no such files.
    shards: list[int] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def batch(self, indices: np.ndarray, rng: np.random.Generator, rows: Rows = EVERY_ROW) -> Batch:
        """The images `indices[rows]` of a batch `indices` [B]; random augmentation is drawn from
        `rng` for all of the batch, so that it does not matter who else works on other rows."""
        raise NotImplementedError

    @property
    def skipped(self) -> dict[str, str]:
        """Files found unreadable so far, with the reason."""
        return {}

    def decode(self, x: Tensor) -> Tensor:
        """Pictures of model output x [B, C, H, W]: uint8 [B, H, W, C], C = 1 or 3."""
        return to_uint8(x)


class ArrayDataset(Dataset):
    """Images [N, C, H, W] in memory: uint8 pixels, or floats that are passed on as they are."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, num_classes: int, flip: float = 0.0):
        self.images = torch.from_numpy(np.require(images, requirements="CW"))
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.shape = tuple(self.images.shape[1:])  # type: ignore[assignment]
        self.num_classes = num_classes
        self.flip = flip

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: np.ndarray, rng: np.random.Generator, rows: Rows = EVERY_ROW) -> Batch:
        chosen = torch.from_numpy(indices[rows])
        images = self.images[chosen]
        x = to_float(images) if images.dtype == torch.uint8 else images.float()
        return Batch(flip_some(x, self.flip, rng, len(indices), rows), self.labels[chosen])


def flip_some(
    x: Tensor, probability: float, rng: np.random.Generator, batch: int, rows: Rows = EVERY_ROW
) -> Tensor:
    """Mirror each image of x, the `rows` of a batch, left to right with the given probability."""
    if probability == 0:
        return x
    flipped = torch.from_numpy(rng.random(batch)[rows] < probability)
    return torch.where(flipped[:, None, None, None], x.flip(-1), x)


def to_float(images: Tensor) -> Tensor:
    """uint8 pixels to float32 in [-1, 1]: 0 is -1, 255 is 1."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Pictures uint8 [B, H, W, C] of x [B, C, H, W] in [-1, 1] (clipped), C = 1 or 3.

    Raises ValueError for other numbers of channels: latents need their decoder.
    """
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"x must have shape [B, 1 or 3, H, W] to be shown, got {list(x.shape)}")
    pixels = (x.detach().float() * 127.5 + 127.5).round().clamp(0, 255)
    return pixels.to("cpu", torch.uint8).permute(0, 2, 3, 1).contiguous()
