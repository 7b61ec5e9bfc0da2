"""What a step on several ranks sends and waits for, counted in the profiler's record of it."""

import dataclasses
import gzip
import json

import pytest
from ranks import records, run_ranks
from workers import (
    operations_of_steps,
    step_without_reading,
    sums_of_the_benchmark,
    timed_collectives,
    train_with_profile,
)

from tim.bench.step import StepSize
from tim.config import ParallelConfig, RunConfig
from tim.models import TiMConfig
from tim.profiling import ACTIVE, COMMUNICATION, EXPOSED, STEPS
from tim.step import PHASES
from tiny_runs import config

EACH_STRATEGY = pytest.mark.parametrize("strategy", ["ddp", "fsdp"])


def run_config(strategy: str, **train) -> RunConfig:
    parallel = ParallelConfig(strategy=strategy, timeout=60)
    return dataclasses.replace(config(batch_size=32, **train), parallel=parallel)


@EACH_STRATEGY
def test_parts_of_a_batch_send_no_more_than_a_whole_one(tmp_path, strategy) -> None:
    configs = [run_config(strategy, accumulate=parts) for parts in (1, 4)]
    for whole, parts in run_ranks(2, tmp_path / "logs", operations_of_steps, configs, tmp_path):
        assert parts["tim::transition_loss"] == 4 * whole["tim::transition_loss"] > 0
        sums = ("c10d::allreduce_", "c10d::_reduce_scatter_base_")
        assert [parts[name] for name in sums] == [whole[name] for name in sums]
        # Besides gradients the loss; sharded, a norm whose parts lie on different ranks.
        assert [whole[name] for name in sums] == ([2, 0] if strategy == "ddp" else [2, 2])


@EACH_STRATEGY
def test_optimizer_and_average_are_a_fused_call_each(tmp_path, strategy) -> None:
    configs = [run_config(strategy)]
    # The optimizer's call with sharded tensors is recorded, and the one with what a rank holds.
    calls = {"aten::_fused_adamw_": 1 if strategy == "ddp" else 2, "aten::_fused_sgd_": 1}
    for (step,) in run_ranks(2, tmp_path / "logs", operations_of_steps, configs, tmp_path):
        assert {name: step[name] for name in calls} == calls
        assert not [name for name in step if "addcdiv" in name or "lerp" in name]


@EACH_STRATEGY
def test_nothing_in_a_step_reads_a_tensor_back(tmp_path, strategy) -> None:
    base = run_config(strategy, accumulate=2)
    for finite in run_ranks(2, tmp_path / "logs", step_without_reading, base, tmp_path / "run"):
        assert finite


@EACH_STRATEGY
def test_every_rank_writes_its_profile(tmp_path, strategy) -> None:
    run = tmp_path / "run"
    base = run_config(strategy, steps=STEPS)
    run_ranks(2, tmp_path / "logs", train_with_profile, base, run)
    assert {p.name for p in (run / "profile").iterdir()} == {"rank0.json.gz", "rank1.json.gz"}
    for path in (run / "profile").iterdir():
        with gzip.open(path, "rt") as file:
            names = [e.get("name") for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
        assert [names.count(phase) for phase in PHASES] == [ACTIVE] * len(PHASES)
        assert names.count("gloo:all_reduce") >= 2 * ACTIVE
    (told,) = (r["seconds"] for r in records(run) if r.get("event") == "profile")
    assert 0 < told[EXPOSED] <= told[COMMUNICATION]
    steps = [r for r in records(run) if "denoising" in r]
    assert len(steps) == STEPS
    for record in steps:
        assert 0 < record["communication_s"] < 1 / record["steps_per_second"]
        assert record["backward_s"] > 0


@pytest.mark.parametrize(("strategy", "collectives"), [("fsdp", 2), ("hybrid", 3)])
def test_the_collectives_of_sharded_modules_are_timed(tmp_path, strategy, collectives) -> None:
    base = run_config(strategy)
    ranks = 2
    if strategy == "hybrid":
        ranks = 4
        base = dataclasses.replace(base, parallel=dataclasses.replace(base.parallel, shard_size=2))
    for begun, ended, seen in run_ranks(
        ranks, tmp_path / "logs", timed_collectives, base, tmp_path
    ):
        # Those of weights, of gradients inside a group, and across groups; the loss and the norm
        # are added up in others.
        assert len(seen) == collectives
        assert begun == ended == sum(seen.values()) > 0


def test_the_steps_of_the_benchmark_add_up_their_gradients(tmp_path) -> None:
    model = TiMConfig(
        input_size=8, hidden_size=32, depth=1, num_heads=2, num_classes=10, lora_hidden_size=8
    )
    size = StepSize("tiny", model, 10)
    for found in run_ranks(2, tmp_path / "logs", sums_of_the_benchmark, size):
        # Ours also the loss, for the log.
        assert found == {
            "jvp": (2, True), "jvp, references": (2, True),
            "dde": (2, True), "dde, references": (2, True), "public dde": (1, True),
        }  # fmt: skip
