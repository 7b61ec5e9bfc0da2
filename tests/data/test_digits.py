"""The embedded digits and their fixed split."""

import numpy as np
import torch
from sklearn.datasets import load_digits

from tim.data.digits import digits


def test_shapes_and_range() -> None:
    train, test = digits("train"), digits("test")
    assert (len(train), len(test)) == (1500, 297)
    assert train.shape == (1, 8, 8) and train.num_classes == 10
    x = train.batch(np.arange(1500), np.random.default_rng(0)).x
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    assert len(x.unique()) == 17


def test_split_is_fixed_disjoint_and_stratified() -> None:
    pixels, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    parts = [
        digits(split).batch(np.arange(n), rng) for split, n in (("train", 1500), ("test", 297))
    ]
    together = torch.cat([part.x.flatten(1) for part in parts]).add(1).mul(8).numpy()
    np.testing.assert_array_equal(np.unique(together, axis=0), np.unique(pixels, axis=0))
    assert together.sum() == pixels.sum()
    share = torch.bincount(parts[1].y) / torch.from_numpy(np.bincount(labels))
    assert (share - 297 / 1797).abs().max() < 0.01
    # Written down once: the split must never change, or results stop being comparable.
    assert parts[1].y[:16].tolist() == SPLIT_START


SPLIT_START = [4, 5, 6, 7, 3, 9, 8, 1, 5, 0, 2, 7, 3, 6, 2, 4]
