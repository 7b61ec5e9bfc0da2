"""Aspect-ratio buckets: a few sizes of about the same area, one of which fits each image."""

from __future__ import annotations

import math
from collections.abc import Sequence

Size = tuple[int, int]


def buckets(side: int, multiple: int, max_aspect: float = 2.0) -> list[Size]:
    """Sizes (height, width) in multiples of `multiple` whose area is about, and at most, side^2.

    For each height, the largest width that keeps the area; no side is more than `max_aspect` times
    the other. A `max_aspect` of 1 gives the square alone.

    Raises ValueError for values that leave no size.
    """
    if multiple < 1 or side < multiple or side % multiple:
        raise ValueError(f"side must be a multiple of {multiple}, got {side}")
    if max_aspect < 1:
        raise ValueError(f"max_aspect must be at least 1, got {max_aspect}")
    n = side // multiple
    found = set()
    for short in range(1, n + 1):
        long = n * n // short
        if long <= max_aspect * short:
            found |= {(short * multiple, long * multiple), (long * multiple, short * multiple)}
    return sorted(found)


def nearest(sizes: Sequence[Size], height: int, width: int) -> Size:
    """The size whose aspect ratio is closest to that of a height x width image."""
    aspect = math.log(height / width)
    return min(sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - aspect), size))
