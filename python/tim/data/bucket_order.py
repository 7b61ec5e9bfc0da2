"""The order of images of several sizes: batches of one size each."""

from __future__ import annotations

import numpy as np


class BucketOrder:
    """Which images step `s` uses, all of one size: like `BatchOrder`, with no state.

    In each epoch the images of a size are permuted and cut into batches, the last of which is
    filled up from the beginning of the permutation, and the batches of all sizes are shuffled. So
    each image comes at least once per epoch, and all of it follows from (seed, epoch).

    Args:
        size_of: [N], number of the size of each image.

    Raises ValueError for no images or a batch size below 1.
    """

    def __init__(self, size_of: np.ndarray, batch_size: int, seed: int) -> None:
        if len(size_of) < 1 or batch_size < 1:
            raise ValueError(
                f"there must be images and batch_size at least 1, got {len(size_of)}, {batch_size}"
            )
        self.batch_size, self.seed = batch_size, seed
        self.images_per_step = float(batch_size)
        self._members = [np.flatnonzero(size_of == size) for size in np.unique(size_of)]
        self.steps_per_epoch = sum(-(-len(m) // batch_size) for m in self._members)
        self._epoch = -1
        self._batches = np.empty((0, batch_size), np.int64)

    def epoch(self, number: int) -> np.ndarray:
        """All batches of an epoch, [steps_per_epoch, batch_size]."""
        if number != self._epoch:
            rng = np.random.default_rng([self.seed, number])
            rows = []
            for members in self._members:
                order = rng.permutation(members)
                count = -(-len(order) // self.batch_size)
                # Over again from the start, as often as a small bucket needs.
                rows.append(np.resize(order, (count, self.batch_size)))
            self._batches = rng.permutation(np.concatenate(rows))
            self._epoch = number
        return self._batches

    def indices(self, step: int) -> np.ndarray:
        """Images of step `step` (from 0), int64 [batch_size]."""
        number, row = divmod(step, self.steps_per_epoch)
        return self.epoch(number)[row]
