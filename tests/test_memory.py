"""The estimated memory of a step against what PyTorch's allocator hands out in a real one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tim import TiM, memory, presets
from tim.config import GuidanceConfig, RunConfig
from tim.data import Batch
from tim.ema import EMA
from tim.step import TrainingStep


def configured(**changes: object) -> RunConfig:
    config = presets.get("digits")
    train = {"batch_size": 32, **changes}
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))


def allocated(config: RunConfig) -> int:
    """Most bytes that PyTorch's allocator had handed out at any time in the second step."""
    torch.manual_seed(0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model = TiM(config.model)
        model.gradient_checkpointing = config.train.gradient_checkpointing
        loss = config.objective.build(config.transport.build())
        step = TrainingStep(model, EMA(model), loss, config)
        shape = config.model
        size = config.train.batch_size
        x = torch.zeros(size, shape.in_channels, shape.input_size, shape.input_size)
        for number in range(2):
            step.load(Batch(x, torch.zeros(size, dtype=torch.long), None), number)
            step.run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_what_the_allocator_hands_out(precision: str, checkpointing: bool) -> None:
    config = configured(precision=precision, gradient_checkpointing=checkpointing)
    assert memory.estimate(config).total == pytest.approx(allocated(config), rel=0.1)


def test_weights_moments_and_averages_are_counted_to_the_byte() -> None:
    weights = 4 * sum(p.numel() for p in TiM(presets.get("digits").model).parameters())
    found = memory.estimate(configured())
    assert (found.weights, found.average, found.moments) == (weights, weights, 2 * weights)
    assert found.total == sum(found)


def test_more_images_need_as_much_more() -> None:
    four, eight, sixteen = (
        memory.estimate(configured(batch_size=n)).activations for n in (32, 64, 128)
    )
    assert sixteen - eight == pytest.approx(2 * (eight - four), rel=0.02)


def test_ranks_share_the_images() -> None:
    one = memory.estimate(configured(batch_size=32))
    two = memory.estimate(configured(batch_size=64), ranks=2)
    assert two.activations == one.activations and two.weights == one.weights
    # Its buckets keep them from the first to the last step.
    assert two.gradients == two.weights


def test_sharding_shares_the_weights_and_gathers_some() -> None:
    whole = memory.estimate(configured(), ranks=2)
    shared = memory.estimate(configured(), ranks=2, strategy="fsdp")
    for name in ("weights", "average", "moments"):
        assert getattr(shared, name) == pytest.approx(getattr(whole, name) / 2, abs=4)
    assert shared.gathered > 0
    kept = memory.estimate(configured(), ranks=2, strategy="fsdp", reshard=False)
    assert kept.gathered > shared.gathered


def test_hybrid_sharding_shares_within_a_group() -> None:
    full = memory.estimate(configured(), ranks=4, strategy="fsdp")
    pairs = memory.estimate(configured(), ranks=4, strategy="hybrid", shard_size=2)
    assert pairs.weights == pytest.approx(2 * full.weights, abs=4)


def test_guidance_gathers_the_average_as_well() -> None:
    config = configured()
    guided = dataclasses.replace(
        config,
        objective=dataclasses.replace(config.objective, guidance=GuidanceConfig(enabled=True)),
    )
    plain, more = (memory.estimate(c, ranks=2, strategy="fsdp") for c in (config, guided))
    assert more.gathered > plain.gathered


def test_recomputation_keeps_less() -> None:
    kept, again = (
        memory.estimate(configured(batch_size=128, gradient_checkpointing=on))
        for on in (False, True)
    )
    assert again.activations < kept.activations / 2


def test_captions_of_a_text_model() -> None:
    config = presets.get("tim-t2i-xl1")
    shape = dataclasses.replace(config.model, depth=2, encoder_depth=1, hidden_size=96, num_heads=4)
    config = dataclasses.replace(
        config, model=shape, train=dataclasses.replace(config.train, batch_size=16)
    )
    # Keys and values of the captions alone, in two blocks.
    assert memory.estimate(config).activations > 2 * 2 * 16 * 256 * 96 * 2


@pytest.mark.parametrize(
    ("ranks", "options", "message"),
    [
        (0, {}, "ranks must be at least 1, got 0"),
        (3, {}, "batch must be a multiple of 1 parts .* 3 ranks, got 32"),
        (4, {"strategy": "hybrid", "shard_size": 3}, "shard_size must divide 4 ranks, got 3"),
    ],
)
def test_wrong_numbers_of_ranks(ranks: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory.estimate(configured(), ranks, **options)


def test_the_table_has_a_column_for_each_way() -> None:
    headings, *rows = memory.table(configured(batch_size=32), ranks=16)
    assert headings[1:] == ("ddp", "ddp *", "fsdp", "fsdp *", "hybrid", "hybrid *")
    assert [row[0] for row in rows] == [*memory.Memory._fields, "in all"]
    for column in range(1, len(headings)):
        *parts, total = (float(row[column]) for row in rows)
        assert total == pytest.approx(sum(parts), abs=0.05)
