"""The shift of times for the resolution of an image, in training and in sampling.

Source: arXiv 2509.04394. In a large image neighbours are alike, so it takes more noise to hide as
much of it: times are moved towards noise by t_m = s t / (1 + (s - 1) t), which multiplies the ratio
of noise to data t / (1 - t) by s = sqrt(tokens / tokens of a 1024 x 1024 image). The released
weights were trained without it.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from tim import images
from tim.images import Images
from tim.transports import Transport

T = TypeVar("T", Tensor, float)


def shift_time(u: T, shift: Tensor | float) -> T:
    """s u / (1 + (s - 1) u) of u in [0, 1]: 0 and 1 stay where they are."""
    return shift * u / (1 + (shift - 1) * u)


def shift_within(transport: Transport, t: T, shift: Tensor | float) -> T:
    """`shift_time` of times of a transport, whose range is mapped onto [0, 1] and back."""
    span = transport.T_max - transport.T_min
    return transport.T_min + span * shift_time((t - transport.T_min) / span, shift)


def resolution_shift(tokens: int, base_tokens: int = 1024) -> float:
    """The s of `shift_time` for images of so many tokens: sqrt(tokens / base_tokens).

    ``base_tokens`` is the number of tokens of a 1024 x 1024 image: 1024 with an autoencoder that
    shrinks 32 times and patches of 1, as the text model has; 4096 with 8 times and patches of 2.
    Counts of latent positions (height times width) instead of tokens give the same s.
    """
    if tokens < 1 or base_tokens < 1:
        raise ValueError(f"tokens and base_tokens must be positive, got {tokens}, {base_tokens}")
    return math.sqrt(tokens / base_tokens)


def resolution_shifts(x: Images, base: int, dtype: torch.dtype) -> Tensor | float:
    """`resolution_shift` of a batch of latents, of a packed one a vector [B] in `dtype`."""
    if not images.is_packed(x):
        return resolution_shift(images.positions(x), base)
    shifts = [resolution_shift(positions, base) for positions in images.positions(x)]
    device = x[0].device
    pinned = torch.tensor(shifts, dtype=dtype, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)
