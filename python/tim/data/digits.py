"""scikit-learn's 1797 scanned digits, 8 x 8 grey pixels: data that need no download."""

from __future__ import annotations

import numpy as np

from tim.data.dataset import ArrayDataset

HELD_OUT = 297


def digits(split: str = "train", flip: float = 0.0) -> ArrayDataset:
    """The 1500 training digits or the 297 held-out ones ("test"), [N, 1, 8, 8] in [-1, 1].

    The split never changes: the images are put in order of class, and the held-out ones are spread
    evenly over that row, so every class is in both parts in the same proportion.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    place = np.empty(len(labels), dtype=np.int64)
    place[np.argsort(labels, kind="stable")] = np.arange(len(labels))
    held_out = (place + 1) * HELD_OUT // len(labels) > place * HELD_OUT // len(labels)
    chosen = held_out if split == "test" else ~held_out
    # Grey levels 0 .. 16.
    images = (pixels[chosen] / 8 - 1).astype(np.float32).reshape(-1, 1, 8, 8)
    return ArrayDataset(images, labels[chosen], num_classes=10, flip=flip)
