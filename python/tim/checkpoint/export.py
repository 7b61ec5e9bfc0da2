"""Weights out of a run's checkpoints, as one file."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import load_file

from tim._checksums import problem_with, read_sums
from tim.checkpoint.whole import AVERAGE, MODEL, save_weights
from tim.config import RunConfig
from tim.models.loading import SHARDS, checkpoints


def export_weights(run: Path, out: Path, weights: str = "ema", step: int | None = None) -> Path:
    """Write the weights ("ema" or "model") of checkpoint `step` of `run`, by default the newest, to
    the safetensors file `out`; returns the checkpoint. Its files are checked first.

    Raises FileNotFoundError when there is no such run or checkpoint, ValueError when it is damaged.
    """
    config = RunConfig.load(run / "config.yaml").model
    found = {int(path.name): path for path in checkpoints(run / "checkpoints")}
    if not found:
        raise FileNotFoundError(f"{run} holds no complete checkpoints/<step>")
    if step is not None and step not in found:
        raise FileNotFoundError(
            f"{run} holds no checkpoint of step {step}, only of {', '.join(map(str, found))}"
        )
    checkpoint = found[max(found) if step is None else step]
    sums = read_sums(checkpoint) or {}
    if (problem := problem_with(checkpoint, sums, sums)) is not None:
        raise ValueError(problem)
    if (checkpoint / SHARDS).is_dir():
        from tim.checkpoint import sharded

        kind = sharded.AVERAGE if weights == "ema" else sharded.MODEL
        tensors = sharded.read_weights(checkpoint / SHARDS, kind)
    else:
        tensors = load_file(checkpoint / (AVERAGE if weights == "ema" else MODEL))
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        save_weights(tensors, config, temporary)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return checkpoint
