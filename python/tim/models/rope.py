"""Two-dimensional rotary position tables for any token grid, and their extrapolation.

A network sees positions up to those of its training images. On larger grids the frequencies can be
lowered, so that its positions stay within what it knows. The formulas are those of the public
implementation, which are those of YaRN (Peng et al., arXiv 2309.00071) for each axis.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from tim.models.tables import cached

MAX_PERIOD = 10000.0

Grid = Literal["spatial", "released"]
Scaling = Literal["none", "linear", "ntk-aware", "ntk-by-parts", "yarn"]
SCALINGS: tuple[str, ...] = get_args(Scaling)
#: Turns over the training length between which "ntk-by-parts" goes from the changed base to
#: interpolation, and from the frequencies as they are to those; and between which "yarn" does so.
NTK_TO_LINEAR = (1.25, 0.75)
PLAIN_TO_NTK = (16.0, 2.0)
PLAIN_TO_LINEAR = (32.0, 1.0)


def rope_tables(
    height: int,
    width: int,
    head_dim: int,
    grid: Grid = "spatial",
    *,
    scaling: Scaling = "none",
    train_size: int | None = None,
    decouple: bool = False,
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

    With `scaling`, and s = max(1, side / train_size) for the longer side of the grid:

        linear         frequencies / s
        ntk-aware      base 10000 s^(d / (d - 2)), d = head_dim / 2: the highest frequency stays,
                       the lowest is divided by s
        ntk-by-parts   as they are where the training length holds many turns, ntk-aware in
                       between, linear where it holds less than one
        yarn           as they are, or linear, likewise; and tables times 1 + 0.1 ln s

    Args:
        height, width: tokens per column and row of the grid.
        head_dim: multiple of 4.
        grid: "spatial" or "released".
        scaling: see above; nothing changes on grids up to train_size.
        train_size: tokens of the training images along a side.
        decouple: scale each axis by its own side instead of the longer one.
        dtype: of the tables; angles are computed in float64.

    Returns:
        cos, sin: [height * width, head_dim], the two channels of a pair holding the same value.
        Shared between calls: do not write to them.

    Raises:
        ValueError: scaling without train_size.
    """
    period = height if grid == "released" else width
    other = height * width // period
    scales = 1.0, 1.0, 1.0
    if scaling != "none":
        if train_size is None:
            raise ValueError(f"scaling {scaling!r} needs train_size, got None")
        longer = max(1.0, max(height, width) / train_size)
        # The first coordinate counts to `period`.
        own = [max(1.0, side / train_size) if decouple else longer for side in (period, other)]
        scales = *own, longer
    return cached(
        _tables, height * width, period, head_dim, scaling, scales, train_size,
        torch.device(device), dtype,
    )  # fmt: skip


def _tables(
    tokens: int,
    period: int,
    head_dim: int,
    scaling: Scaling,
    scales: tuple[float, float, float],
    train_size: int | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    token = torch.arange(tokens, device=device)
    angles = torch.cat(
        [
            coordinate[:, None] * frequencies(head_dim, scaling, scale, train_size, device)
            for coordinate, scale in zip((token % period, token // period), scales, strict=False)
        ],
        dim=1,
    ).repeat_interleave(2, dim=1)
    magnitude = 1 + 0.1 * math.log(scales[2]) if scaling == "yarn" else 1.0
    return (magnitude * angles.cos()).to(dtype), (magnitude * angles.sin()).to(dtype)


def frequencies(
    head_dim: int,
    scaling: Scaling,
    scale: float,
    train_size: int | None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Frequencies [head_dim / 4] of one axis, float64, the highest first."""
    k = torch.arange(head_dim // 4, dtype=torch.float64, device=device)
    d = head_dim // 2
    plain = MAX_PERIOD ** (-2 * k / d)
    if scaling == "none" or scale == 1:
        return plain
    linear = plain / scale
    if scaling == "linear":
        return linear
    if scaling == "yarn":
        return _blend(plain, linear, PLAIN_TO_LINEAR, d, train_size)
    # With a single frequency there is no lowest one to bring down.
    ntk = (MAX_PERIOD * scale ** (d / (d - 2))) ** (-2 * k / d) if d > 2 else plain
    if scaling == "ntk-aware":
        return ntk
    parts = _blend(ntk, linear, NTK_TO_LINEAR, d, train_size)
    return _blend(plain, parts, PLAIN_TO_NTK, d, train_size)


def _blend(fast: Tensor, slow: Tensor, turns: tuple[float, float], d: int, length: int) -> Tensor:
    """`fast` where a frequency makes more than turns[0] turns over `length`, `slow` where it makes
    less than turns[1], with a ramp over the frequencies in between."""
    places = [d * math.log(length / (n * 2 * math.pi)) / (2 * math.log(MAX_PERIOD)) for n in turns]
    low = max(math.floor(places[0]), 0)
    high = max(min(math.ceil(places[1]), d - 1), low)
    k = torch.arange(len(fast), dtype=fast.dtype, device=fast.device)
    ramp = ((k - low) / max(high - low, 0.001)).clamp(0, 1)
    return fast * (1 - ramp) + slow * ramp
