"""Two-dimensional rotary position tables for any token grid."""

from typing import Literal

import torch
from torch import Tensor

from tim.models.tables import cached

MAX_PERIOD = 10000.0


def rope_tables(
    height: int,
    width: int,
    head_dim: int,
    grid: Literal["spatial", "released"] = "spatial",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for a row-major grid of `height` x `width` tokens.

    The first half of the head turns with one coordinate of the token, the second half with the
    other. Each half has head_dim / 4 frequencies 10000^(-2k / (head_dim / 2)), each for two
    adjacent channels. Token n has the coordinates

        spatial     (n mod width, n div width)     column and row
        released    (n mod height, n div height)   the public implementation's enumeration

    which agree on square grids. On others the released one is no pair of column and row, but the
    released text model was trained with it.

    Args:
        height, width: tokens per column and row of the grid.
        head_dim: multiple of 4.
        grid: "spatial" or "released".
        dtype: of the tables; angles are computed in float64.

    Returns:
        cos, sin: [height * width, head_dim], the two channels of a pair holding the same value.
        Shared between calls: do not write to them.
    """
    period = height if grid == "released" else width
    return cached(_tables, height * width, period, head_dim, torch.device(device), dtype)


def _tables(
    tokens: int, period: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    token = torch.arange(tokens, device=device)
    coordinates = torch.stack((token % period, token // period), dim=1)
    steps = torch.arange(head_dim // 4, dtype=torch.float64, device=device)
    frequencies = MAX_PERIOD ** (-steps / (head_dim // 4))
    angles = (coordinates[:, :, None] * frequencies).flatten(1).repeat_interleave(2, dim=1)
    return angles.cos().to(dtype), angles.sin().to(dtype)
