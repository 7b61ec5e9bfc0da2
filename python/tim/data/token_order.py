"""The order of packed batches that hold as many images as a number of tokens allows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class TokenOrder:
    """Which images step `s` uses: like `BatchOrder`, with no state, but batches of varying length.

    The images of one shuffled epoch are cut, in turn, into batches of at most `budget` tokens,
    which fixes how many images of which size each batch has. An epoch is those batches in an order
    of its own, their places filled with the images of each size in an order of its own, so that all
    epochs have the same number of steps. Each image comes once per epoch; up to `multiple` - 1 come
    twice.

    Args:
        size_of: [N], number of the size of each image.
        tokens: of an image of each size.
        budget: most tokens of a batch.
        most: most images of a batch.
        multiple: images of a batch are a multiple of this. They stand so that each of `multiple`
            shares (of every part, the rows with the same remainder) has at most budget / multiple
            tokens: whoever works on some of the shares stays within their part of the budget.
        parts: into which a batch is cut; divides `multiple`.

    Raises ValueError for no images, or when an image of the largest size is over a share.
    """

    def __init__(
        self,
        size_of: np.ndarray,
        tokens: Sequence[int],
        budget: int,
        most: int,
        seed: int,
        multiple: int = 1,
        parts: int = 1,
    ) -> None:
        if len(size_of) < 1:
            raise ValueError(f"there must be images, got {len(size_of)}")
        self.seed = seed
        count = np.asarray(tokens, dtype=np.int64)
        limit = budget // multiple
        if (largest := int(count[np.unique(size_of)].max())) > limit:
            shares = f" for each of {multiple} shares (data.budget_multiple)" * (multiple > 1)
            raise ValueError(
                f"data.token_budget must hold the largest image, {largest} tokens{shares}, "
                f"got {budget}"
            )
        # Four numbers: another stream than those of the epochs.
        row = np.random.default_rng([seed, 0, 0, 3]).permutation(size_of)
        row = np.resize(row, -(-len(row) // multiple) * multiple).reshape(-1, multiple)
        batches = _cut(row, count, limit, most // multiple)
        self._places = np.concatenate(
            [b.reshape(len(b), parts, -1).swapaxes(0, 1).ravel() for b in batches]
        )
        self._ends = np.cumsum([b.size for b in batches])
        self._members = [np.flatnonzero(size_of == size) for size in range(len(count))]
        self.steps_per_epoch = len(batches)
        self.images_per_step = len(self._places) / len(batches)
        self._epoch = -1
        self._images = self._order = np.empty(0, np.int64)

    def indices(self, step: int) -> np.ndarray:
        """Images of step `step` (from 0), int64 [a multiple of `multiple`]."""
        number, row = divmod(step, self.steps_per_epoch)
        if number != self._epoch:
            rng = np.random.default_rng([self.seed, number, 3])
            self._images = np.empty_like(self._places)
            for size, members in enumerate(self._members):
                mine = self._places == size
                self._images[mine] = np.resize(rng.permutation(members), mine.sum())
            self._order = rng.permutation(self.steps_per_epoch)
            self._epoch = number
        batch = self._order[row]
        return self._images[self._ends[batch - 1] if batch else 0 : self._ends[batch]]


def _cut(row: np.ndarray, tokens: np.ndarray, limit: int, most: int) -> list[np.ndarray]:
    """Sizes [n, multiple] of the batches: rows taken until a column is over the limit."""
    batches, batch = [], []
    filled = np.zeros(row.shape[1], np.int64)
    for sizes in row:
        if len(filled) > 1:
            # The largest to where there is most room.
            sizes = sizes[np.argsort(-tokens[sizes], kind="stable")]
            arranged = np.empty_like(sizes)
            arranged[np.argsort(filled, kind="stable")] = sizes
            sizes = arranged
        if batch and (len(batch) == most or (filled + tokens[sizes]).max() > limit):
            batches.append(np.stack(batch))
            batch, filled = [], np.zeros_like(filled)
        batch.append(sizes)
        filled = filled + tokens[sizes]
    return [*batches, np.stack(batch)]
