"""Images of several sizes on several ranks, each of which gets its rows of every batch."""

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
from ranks import run_ranks
from workers import train_all

from mixed_sizes import config, latents_of_several_sizes
from tim.config import ParallelConfig


def runs(latents: Path, **parallel) -> dict:
    # Batches of 8 and of 4 images.
    budget = config(latents, True, steps=3, batch_size=8)
    data = dataclasses.replace(budget.data, token_budget=140, budget_multiple=4)
    settings = {
        "buckets": config(latents, False, steps=3),
        "packed": config(latents, True, steps=3),
        "budget": dataclasses.replace(budget, data=data),
    }
    spread = ParallelConfig(timeout=120, **parallel)
    return {name: dataclasses.replace(s, parallel=spread) for name, s in settings.items()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_are_one(tmp_path: Path, strategy: str) -> None:
    latents = latents_of_several_sizes(tmp_path)
    expected = train_all(runs(latents), tmp_path / "alone")
    results = run_ranks(
        2, tmp_path / "logs", train_all, runs(latents, strategy=strategy), tmp_path / "two"
    )
    for result in results:
        for name, alone in expected.items():
            values = result[name]["values"]
            assert (values - alone["values"]).norm() < 1e-4 * alone["values"].norm(), name
            for key, value in alone["weights"].items():
                error = (result[name]["weights"][key] - value).norm() / value.norm().clamp(1e-12)
                assert error < 1e-3, f"{name}, {key}: {error}"
