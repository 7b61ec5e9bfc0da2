"""Reads the reference numbers in tests/golden (format and tolerances: tests/golden/README.md)."""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open

GOLDEN_DIR = Path(__file__).parent / "golden"


@cache
def _read(file_name: str) -> tuple[dict[str, torch.Tensor], str]:
    with safe_open(GOLDEN_DIR / f"{file_name}.safetensors", framework="pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, file.metadata()["config"]


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
