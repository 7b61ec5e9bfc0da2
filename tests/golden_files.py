"""Reads the reference numbers in tests/golden (format and tolerances: tests/golden/README.md)."""

import json
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open

GOLDEN_DIR = Path(__file__).parent / "golden"


@lru_cache(maxsize=None)
def _read(name: str) -> tuple[dict[str, torch.Tensor], str]:
    with safe_open(GOLDEN_DIR / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()["config"]


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and configuration of ``tests/golden/<name>.safetensors``; callers own the copies."""
    tensors, config = _read(name)
    return {key: tensor.clone() for key, tensor in tensors.items()}, json.loads(config)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """``||actual - expected|| / ||expected||`` over the whole tensor, evaluated in float64."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {list(actual.shape)}, expected {list(expected.shape)}")
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm()).item()
