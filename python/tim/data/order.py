"""The order of the images: a function of seed and step, with no state to save or to replay."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from tim.data.bucket_order import BucketOrder
from tim.data.dataset import Batch, Dataset


class BatchOrder:
    """Which images step `s` uses: positions s B .. s B + B - 1 of the row of shuffled epochs.

    Epoch e is a permutation of all images seeded by (seed, e), so each image comes once per epoch;
    a batch that reaches over the end of an epoch goes on in the next one.
    """

    def __init__(self, length: int, batch_size: int, seed: int):
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.length)
            self._epoch = epoch
        return self._permutation

    def indices(self, step: int) -> np.ndarray:
        """Images of step `step` (from 0), int64 [batch_size]."""
        start = step * self.batch_size
        parts = []
        while (missing := (step + 1) * self.batch_size - start) > 0:
            epoch, offset = divmod(start, self.length)
            parts.append(self.permutation(epoch)[offset : offset + missing])
            start += len(parts[-1])
        return np.concatenate(parts)


def make_order(dataset: Dataset, batch_size: int, seed: int) -> BatchOrder | BucketOrder:
    """The order of a data set's images: batches of one size each where there are several that are
    not to be packed."""
    if len(dataset.sizes) > 1 and not dataset.packed:
        return BucketOrder(dataset.size_of, batch_size, seed)
    return BatchOrder(len(dataset), batch_size, seed)


def batches(
    dataset: Dataset,
    order: BatchOrder | BucketOrder,
    start: int,
    stop: int,
    rows: np.ndarray | None = None,
) -> Iterator[Batch]:
    """The batches of steps start .. stop - 1, or `rows` of each; augmentation is drawn from
    (seed, step).

    Data sets with `prefetch` > 0 are read that many batches ahead in a thread.
    """

    def make(step: int) -> Batch:
        # The third number keeps this stream apart from the permutations' (seed, epoch).
        rng = np.random.default_rng([order.seed, step, 1])
        indices = order.indices(step)
        return dataset.batch(indices, rng) if rows is None else dataset.batch(indices, rng, rows)

    if dataset.prefetch == 0:
        yield from map(make, range(start, stop))
        return
    with ThreadPoolExecutor(1, "tim-prefetch") as reader:
        ready: deque[Future[Batch]] = deque()
        try:
            for step in range(start, stop):
                ready.append(reader.submit(make, step))
                if len(ready) > dataset.prefetch:
                    yield ready.popleft().result()
            while ready:
                yield ready.popleft().result()
        finally:
            for future in ready:
                future.cancel()
