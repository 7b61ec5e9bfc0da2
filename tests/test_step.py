"""One training step: the host never waits in it, and the device can skip it."""

import itertools

import numpy as np
import pytest
import torch

from readings import ReadBack, no_reading
from tim.config import GuidanceConfig, ObjectiveConfig, TrainConfig
from tim.step import VALUES, learning_rate
from tim.trainer import Trainer
from tiny_runs import config, same, weights


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.item(), lambda x: x.sum().tolist(), lambda x: x.numpy(), lambda x: x.cpu(),
        lambda x: bool(x[0] > 0), lambda x: float(x[0]), lambda x: range(x[0].long()),
        lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: torch.equal(x, x), lambda x: str(x),
        lambda x: x.to("meta"), lambda x: torch.is_nonzero(x[0]), lambda x: np.asarray(x),
        lambda x: x.to(torch.float64, copy=True).masked_select(x > 0), lambda x: x.unique(),
    ],
)  # fmt: skip
def test_readings_are_caught(read) -> None:
    with pytest.raises(ReadBack), no_reading():
        read(torch.ones(3))


OBJECTIVES = {
    "jvp": (ObjectiveConfig(), {}),
    "jvp in bf16, two parts": (ObjectiveConfig(), {"precision": "bf16", "accumulate": 2}),
    "jvp with checkpointing": (ObjectiveConfig(), {"gradient_checkpointing": True}),
    "dde": (ObjectiveConfig(derivative="dde"), {"clip_norm": 0.0}),
    "guided": (ObjectiveConfig(guidance=GuidanceConfig(enabled=True)), {}),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_in_a_step_reads_a_tensor_back(tmp_path, name) -> None:
    objective, train = OBJECTIVES[name]
    trainer = Trainer(config(objective, **train), tmp_path / "run")
    step = trainer.training_step
    before = weights(trainer)
    for number in range(2):
        step.load(trainer.dataset.batch(np.arange(8), np.random.default_rng(0)), number)
        with no_reading():
            values = step.run()
    assert values.isfinite().all() and values.shape == (len(VALUES),)
    assert not same(before, weights(trainer)[: len(before)])


def test_the_loop_reads_at_records_only(tmp_path) -> None:
    trainer = Trainer(config(steps=6, log_every=3), tmp_path / "run")
    reads = []
    read = trainer._read
    trainer._read = lambda: reads.append(trainer.step) or read()
    trainer.train()
    assert [step for step, _ in itertools.groupby(reads)] == [3, 6]


def test_learning_rate() -> None:
    cosine = TrainConfig(steps=110, lr=2.0, warmup_steps=10, schedule="cosine")
    rates = [learning_rate(step, cosine) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 and rates[60] == pytest.approx(1.0) and 0 < rates[-1] < 1e-3
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    constant = TrainConfig(steps=110, lr=2.0)
    assert {learning_rate(step, constant) for step in (0, 50, 109)} == {2.0}


def test_the_rate_of_each_step_reaches_the_optimizer(tmp_path) -> None:
    """Adam's first step moves a weight by the learning rate, and warm-up sets that."""
    moved = {}
    for warmup in (1, 10):
        run = config(lr=1e-2, warmup_steps=warmup, weight_decay=0.0)
        trainer = Trainer(run, tmp_path / str(warmup))
        before = weights(trainer)
        trainer.train_step(trainer.dataset.batch(np.arange(8), np.random.default_rng(0)))
        pairs = zip(before, trainer.parameters, strict=False)
        moved[warmup] = max((a - b).abs().max().item() for a, b in pairs)
    assert moved == pytest.approx({1: 1e-2, 10: 1e-3}, rel=0.01)
