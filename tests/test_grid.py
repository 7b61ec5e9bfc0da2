"""Sample grids."""

import numpy as np
import torch

from tim.grid import GAP, image_grid, pixels_of


def test_rows_columns_and_enlargement() -> None:
    rows = [torch.full((3, 8, 8, 1), level, dtype=torch.uint8) for level in (200, 100)]
    pixels = pixels_of(image_grid(rows, [1, 32]))
    assert pixels.shape[0] == GAP + 2 * (48 + GAP) and pixels.shape[2] == 3
    left = pixels.shape[1] - 3 * (48 + GAP)
    for i, level in enumerate((200, 100)):
        for j in range(3):
            top, at = GAP + i * (48 + GAP), left + j * (48 + GAP)
            assert (pixels[top : top + 48, at : at + 48] == level).all()
    # The step counts are written before the rows.
    assert (pixels[:, :left] == 255).any()


def test_colours_and_their_places() -> None:
    picture = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 64, 80, 3), np.uint8))
    pixels = pixels_of(image_grid([picture], ["x"]))
    left = pixels.shape[1] - 80 - GAP
    assert pixels[GAP : GAP + 64, left : left + 80].equal(picture[0])
