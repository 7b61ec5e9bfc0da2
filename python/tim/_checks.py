"""Checks of arguments' Python types, so that a wrong one is named before any work is done."""

from __future__ import annotations

import math
from numbers import Real

from torch import Tensor


def check_tensor(name: str, value: object) -> None:
    """TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_floating(name: str, tensor: Tensor) -> None:
    """TypeError unless the tensor has a floating-point dtype."""
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")


def check_number(name: str, value: object) -> None:
    """TypeError unless `value` is a real number, ValueError unless it is finite."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def check_callable(name: str, value: object) -> None:
    """TypeError unless `value` can be called as a network."""
    if not callable(value):
        raise TypeError(f"{name} must be a network, got {type(value).__name__}")
