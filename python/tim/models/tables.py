"""Constant tensors, computed once per device and dtype and shared by all models of the process.

They are no buffers: a buffer would follow the model to bfloat16 and lose its precision, and would
be left without values when a model is built on the meta device.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch._guards import detect_fake_mode

T = TypeVar("T")


def cached(build: Callable[..., T], *key: object) -> T:
    """build(*key), remembered. Tracers and fake tensors get their own, as part of the graph."""
    if torch.compiler.is_compiling() or detect_fake_mode() is not None:
        return build(*key)
    return _cached(build, *key)


@functools.lru_cache(maxsize=64)
def _cached(build: Callable[..., T], *key: object) -> T:
    # What is made inside torch.func.jvp or inference_mode is bound to it; a table outlives both.
    with torch._C._DisableFuncTorch(), torch.inference_mode(False):
        return build(*key)
