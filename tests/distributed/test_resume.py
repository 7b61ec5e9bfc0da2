"""One run on 1, 2 and 4 ranks in turn: no image twice or never, weights as of an unbroken run."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from workers import NumberedImages, train_noting_images

import tim
from tim.checkpoint import checkpoints
from tim.cli import run as command
from tim.config import ParallelConfig
from tim.trainer import Trainer
from tiny_runs import config

pytestmark = pytest.mark.slow

#: Ranks of each leg of the journey, and how they share the model: every kind of checkpoint is read
#: by another number of ranks than wrote it, and by another strategy.
LEGS = [
    (1, {}),
    (4, {"strategy": "hybrid", "shard_size": 2}),
    (2, {"strategy": "fsdp"}),
    (1, {}),
    (2, {"strategy": "ddp"}),
    (4, {"strategy": "fsdp"}),
]
STEPS = 2
BATCH = 16


def leg(number: int, parallel: dict):
    base = config(steps=STEPS * (number + 1), batch_size=BATCH, accumulate=2, keep=99)
    return dataclasses.replace(base, parallel=ParallelConfig(**parallel))


def test_a_journey(tmp_path: Path) -> None:
    run = tmp_path / "run"
    seen: list[list[int]] = []
    for number, (ranks, parallel) in enumerate(LEGS):
        leg_config = leg(number, parallel)
        if ranks == 1:
            results = [train_noting_images(leg_config, run)]
        else:
            logs = tmp_path / f"logs-{number}"
            results = run_ranks(ranks, logs, train_noting_images, leg_config, run)
        for step in range(STEPS):
            shares = [images[step] for images, _ in results]
            assert {len(share) for share in shares} == {BATCH // ranks}
            seen.append(list(itertools.chain(*shares)))

    # Epochs of 60 images in batches of 16: 12 steps are three epochs and 12 images.
    row = Trainer(leg(0, {}), tmp_path / "other", dataset=NumberedImages()).order
    assert [sorted(images) for images in seen] == [
        sorted(row.indices(step).tolist()) for step in range(STEPS * len(LEGS))
    ]
    # The last batch of an epoch reaches into the next one, so count over the epochs that are over.
    counts = torch.bincount(torch.tensor(list(itertools.chain(*seen))), minlength=60)
    assert counts.min() == 3 and counts.max() == 4 and counts.sum() == 16 * 12

    _, expected = train_noting_images(leg(len(LEGS) - 1, {}), tmp_path / "whole")
    weights = results[0][1]
    for name, value in expected.items():
        error = (weights[name] - value).norm() / value.norm().clamp(min=1e-12)
        assert error < 1e-4, f"{name}: {error}"

    sharded = [path for path in checkpoints(run / "checkpoints") if (path / "shards").is_dir()]
    assert [path.name for path in sharded] == ["00000004", "00000006", "00000012"]
    check_weights_of_the_run(run, weights, tmp_path)


def check_weights_of_the_run(run: Path, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """The run directory loads in one process, and so does what is exported from it."""
    assert command(["export", str(run), "--out", str(folder / "ema.safetensors")]) == 0
    out = folder / "model.safetensors"
    assert command(["export", str(run), "--weights", "model", "--out", str(out)]) == 0
    loaded = {"ema": tim.load(run), "model": tim.load(out)}
    for name, value in tim.load(folder / "ema.safetensors").state_dict().items():
        assert value.equal(loaded["ema"].state_dict()[name])
    for kind, model in loaded.items():
        for name, value in model.state_dict().items():
            assert value.equal(weights[f"{kind}.{name}"]), name
