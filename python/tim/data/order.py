"""The order of the images: a function of seed and step, with no state to save or to replay."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tim.data.bucket_order import BucketOrder
from tim.data.dataset import Dataset


class BatchOrder:
    """Which images step `s` uses: positions s B .. s B + B - 1 of the row of shuffled epochs.

    Epoch e is a permutation of all images seeded by (seed, e), so each image comes once per epoch;
    a batch that reaches over the end of an epoch goes on in the next one.
    """

    def __init__(self, length: int, batch_size: int, seed: int):
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        #: On average.
        self.images_per_step = float(batch_size)
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._permutation = self._draw(epoch)
            self._epoch = epoch
        return self._permutation

    def _draw(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.length)

    def indices(self, step: int) -> np.ndarray:
        """Images of step `step` (from 0), int64 [batch_size]."""
        start = step * self.batch_size
        parts = []
        while (missing := (step + 1) * self.batch_size - start) > 0:
            epoch, offset = divmod(start, self.length)
            parts.append(self.permutation(epoch)[offset : offset + missing])
            start += len(parts[-1])
        return np.concatenate(parts)


def make_order(
    dataset: Dataset, batch_size: int, seed: int, window: int | None = None
) -> BatchOrder | BucketOrder:
    """The order of a data set's images: batches of one size each where there are several that are
    not to be packed; shuffled over windows of so many shards, or over all images.

    Raises ValueError for a window of data that are in no shards, or of several sizes.
    """
    bucketed = len(dataset.sizes) > 1 and not dataset.packed
    if window is None:
        if bucketed:
            return BucketOrder(dataset.size_of, batch_size, seed)
        return BatchOrder(len(dataset), batch_size, seed)
    if bucketed:
        raise ValueError(
            f"data.window must be None for latents of several sizes without data.pack, got {window}"
        )
    if dataset.shards is None:
        raise ValueError(
            f"data.window is for .tar files and the shards of tim encode, got {window} for others"
        )
    return WindowOrder(dataset.shards, batch_size, seed, window)


class WindowOrder(BatchOrder):
    """An order for images in shards that lets every rank read few shards, and each of them at once.

    In epoch e the shards stand in an order drawn from (seed, e). Their row of images is cut into
    `lanes` pieces of one length, and within a piece images are shuffled over windows of about
    `window` shards. Row j of a batch is the next image of lane j mod lanes. Ranks whose number
    divides that of the lanes so have lanes, and but for those at the cuts, shards of their own,
    whatever the sizes of the shards. What does not fill a row of all lanes ends the epoch.

    Who reads it does not enter: the batches are the same for any number of ranks and workers.
    """

    def __init__(self, shards: Sequence[int], batch_size: int, seed: int, window: int):
        sizes = np.array([size for size in shards if size > 0], dtype=np.int64)
        super().__init__(int(sizes.sum()), batch_size, seed)
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.ends = np.cumsum(sizes)
        self.sizes = sizes
        self.chunk = window * -(-self.length // len(sizes))
        most = max(1, len(sizes) // window)
        self.lanes = max(n for n in range(1, min(batch_size, most) + 1) if batch_size % n == 0)

    def _draw(self, epoch: int) -> np.ndarray:
        # Three numbers: other streams than the full permutation's, and than those of the steps'.
        rng = np.random.default_rng([self.seed, epoch, 2])
        shards = rng.permutation(len(self.sizes))
        sizes = self.sizes[shards]
        starts = (self.ends - self.sizes)[shards]
        row = np.arange(self.length) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
        length = self.length // self.lanes
        lanes = row[: self.lanes * length].reshape(self.lanes, length)
        for start in range(0, length, self.chunk):
            part = lanes[:, start : start + self.chunk]
            part[:] = rng.permuted(part, axis=1)
        return np.concatenate([lanes.T.reshape(-1), rng.permutation(row[self.lanes * length :])])
