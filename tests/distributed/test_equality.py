"""1 = 2 = 4 ranks in loss and weights for the same global batch, however the model is spread."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from workers import train_all

from tim.config import GuidanceConfig, ObjectiveConfig, ParallelConfig, RunConfig
from tim.step import VALUES
from tiny_runs import config

#: Sums over 16 to 40 images in another order, three steps on: some hundred roundings of float32.
ROUNDING = 1e-5
#: What is different about each run. With a ratio of 0.3, 6 of 20 images have r = t: of 4 ranks two
#: get 2 of them and two get 1.
VARIANTS: dict[str, tuple[ObjectiveConfig | None, dict]] = {
    "jvp": (None, {}),
    "dde": (ObjectiveConfig(derivative="dde", diffusion_ratio=0.3), {"batch_size": 20}),
    "jvp, two parts": (ObjectiveConfig(diffusion_ratio=0.3), {"accumulate": 2, "batch_size": 40}),
    "jvp, checkpointing": (None, {"gradient_checkpointing": True}),
    "guided": (ObjectiveConfig(guidance=GuidanceConfig(enabled=True)), {}),
}


def runs(
    names: Iterable[str] = VARIANTS, options: dict | None = None, **parallel
) -> dict[str, RunConfig]:
    found = {}
    for name in names:
        objective, train = VARIANTS[name]
        base = config(objective, **{"steps": 3, "batch_size": 16, **train, **(options or {})})
        model = dataclasses.replace(base.model, depth=2)
        data = dataclasses.replace(base.data, flip=0.5)
        spread = ParallelConfig(timeout=60, **parallel)
        found[name] = dataclasses.replace(base, model=model, data=data, parallel=spread)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, dict]:
    return train_all(runs(), tmp_path_factory.mktemp("alone"))


#: On four ranks each derivative once, and an average that is evaluated, which is sharded too.
ON_FOUR = ("dde", "jvp, two parts", "guided")
SPREADS = {
    "ddp on 2": (2, VARIANTS, {"strategy": "ddp"}),
    "ddp on 4": (4, VARIANTS, {"strategy": "ddp"}),
    "fsdp on 2": (2, VARIANTS, {"strategy": "fsdp"}),
    "fsdp on 4, not resharded": (4, ON_FOUR, {"strategy": "fsdp", "reshard": False}),
    "hybrid on 4": (4, ON_FOUR, {"strategy": "hybrid", "shard_size": 2}),
}


@pytest.mark.parametrize(
    "spread",
    [
        pytest.param(name, marks=[pytest.mark.slow] if of[0] > 2 else [])
        for name, of in SPREADS.items()
    ],
)
def test_the_number_of_ranks_does_not_matter(tmp_path: Path, alone, spread) -> None:
    size, names, parallel = SPREADS[spread]
    results = run_ranks(size, tmp_path / "logs", train_all, runs(names, **parallel), tmp_path)
    for name in names:
        expected = alone[name]
        for rank, result in enumerate(found[name] for found in results):
            where = f"{name}, rank {rank}"
            assert result["values"].shape == expected["values"].shape == (3, len(VALUES)), where
            error = relative(result["values"], expected["values"])
            assert error < ROUNDING, f"{where}: {error}"
            assert result["weights"].keys() == expected["weights"].keys()
            for key, value in expected["weights"].items():
                error = relative(result["weights"][key], value)
                assert error < ROUNDING, f"{where}, {key}: {error}"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_bf16_on_two_ranks_is_as_near_to_float32_as_on_one(tmp_path: Path, alone, strategy) -> None:
    names = ("jvp", "jvp, checkpointing", "dde")
    bf16 = {"precision": "bf16"}
    one = train_all(runs(names, bf16), tmp_path / "one")
    configs = runs(names, bf16, strategy=strategy)
    for result in run_ranks(2, tmp_path / "logs", train_all, configs, tmp_path / "two"):
        for name in names:
            assert all(v.dtype == torch.float32 for v in result[name]["weights"].values())
            error = error_of_moments(result[name], alone[name])
            allowed = 2 * error_of_moments(one[name], alone[name])
            assert 0 < error <= allowed, f"{name}: {error}"


def error_of_moments(result: dict, expected: dict) -> float:
    """Mean over the parameters of the relative error of the mean gradient."""
    values, exact = result["weights"], expected["weights"]
    names = [name for name in exact if name.endswith(".exp_avg") and exact[name].any()]
    assert len(names) > 20
    return sum(relative(values[name], exact[name]) for name in names) / len(names)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()
