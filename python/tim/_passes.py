"""Contexts for passes through a network that is not being trained in that pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def without_gradient(device: torch.device) -> Iterator[None]:
    """no_grad that is safe inside autocast, beside a pass with gradient through the same weights.

    Autocast keeps its casts of weights; in PyTorch releases before pytorch/pytorch#165068 one made
    under no_grad is used again by the pass with gradient, and the weights behind it get none.
    """
    kind = device.type
    if not torch.is_autocast_enabled(kind):
        with torch.no_grad():
            yield
        return
    dtype = torch.get_autocast_dtype(kind)
    with torch.no_grad(), torch.autocast(kind, dtype=dtype, cache_enabled=False):
        yield


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Evaluation mode for the modules of ``model``, each one's own mode restored afterwards."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
