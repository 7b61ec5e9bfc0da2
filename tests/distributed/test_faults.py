"""What can happen to a run on several ranks, done to real processes: docs/distributed.md, Faults.

After each, nothing is lost but the steps since the last checkpoint.
"""

import dataclasses
import signal
from pathlib import Path

import pytest
from ranks import Ranks, records, run_ranks, wait_for
from workers import (
    train,
    train_on_a_full_disk,
    train_slowly,
    train_with_a_bad_image,
    train_with_slow_writing,
    try_to_train,
    try_to_train_on_other_data,
    what_a_refused_run_tells,
)

from tim.checkpoint import checkpoints
from tim.config import ParallelConfig, RunConfig
from tim.parallel.heartbeat import HANGS
from tiny_runs import config

pytestmark = pytest.mark.slow

FSDP = {"strategy": "fsdp"}


def run_config(parallel: dict | None = None, **values) -> RunConfig:
    parallel = {"timeout": 60.0, **(FSDP if parallel is None else parallel)}
    return dataclasses.replace(config(**values), parallel=ParallelConfig(**parallel))


def steps(run: Path) -> list[int]:
    """Steps in the log."""
    return [record["step"] for record in records(run) if "denoising" in record]


def saved(run: Path) -> list[int]:
    return [int(path.name) for path in checkpoints(run / "checkpoints")]


def assert_goes_on(run: Path, folder: Path, ranks: int, base: RunConfig, at: int) -> None:
    """Resumed, the run ends as one that nothing happened to."""
    train_longer = dataclasses.replace(base.train, steps=at + 2)
    parallel = dataclasses.replace(base.parallel, timeout=60.0)
    longer = dataclasses.replace(base, train=train_longer, parallel=parallel)
    result = run_ranks(ranks, folder / "resumed", train, longer, run, True)[0]
    assert result["first"] == at and len(result["values"]) == 2
    alone = dataclasses.replace(longer, parallel=ParallelConfig())
    expected = train(alone, folder / "unbroken")
    for name, value in expected["weights"].items():
        error = (result["weights"][name] - value).norm() / value.norm().clamp(min=1e-12)
        assert error < 1e-4, f"{name}: {error}"
    assert not list((run / "checkpoints").glob("*.tmp-*"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_rank_is_killed_in_a_step(tmp_path, strategy) -> None:
    run = tmp_path / "run"
    base = run_config({"strategy": strategy}, steps=10_000, checkpoint_every=3)
    with Ranks(2, tmp_path / "logs", train_slowly, base, run, 0.05) as ranks:
        wait_for(lambda: len(steps(run)) >= 5 and 3 in saved(run))
        ranks.send(1, signal.SIGKILL)
        codes = ranks.exit_codes()
    # The other one learns it from its next message, and does not wait for ever.
    assert codes[1] == -signal.SIGKILL and codes[0] == 1
    assert_goes_on(run, tmp_path, 2, base, at=saved(run)[-1])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_rank_is_killed_in_a_save(tmp_path, strategy) -> None:
    run = tmp_path / "run"
    base = run_config({"strategy": strategy}, steps=10_000, checkpoint_every=4)
    with Ranks(2, tmp_path / "logs", train_with_slow_writing, base, run, 0.05) as ranks:
        # The second save has begun.
        wait_for(lambda: 4 in saved(run) and list((run / "checkpoints").glob("00000008.tmp-*")))
        # The one that writes.
        ranks.send(1 if strategy == "fsdp" else 0, signal.SIGKILL)
        codes = ranks.exit_codes()
    assert sorted(codes) == [-signal.SIGKILL, 1]
    assert saved(run) == [4] and list((run / "checkpoints").glob("00000008.tmp-*"))
    assert_goes_on(run, tmp_path, 2, base, at=4)


def test_sigterm_on_one_rank_stops_and_saves_all(tmp_path) -> None:
    run = tmp_path / "run"
    base = run_config(steps=10_000, checkpoint_every=5000)
    with Ranks(4, tmp_path / "logs", train_slowly, base, run, 0.01) as ranks:
        wait_for(lambda: len(steps(run)) >= 3)
        ranks.send(2, signal.SIGTERM)
        assert ranks.exit_codes() == [0, 0, 0, 0], ranks.output(0)
    assert records(run)[-1]["event"] == "terminated"
    last = records(run)[-1]["step"]
    assert saved(run) == [last] and steps(run) == list(range(1, last + 1))
    assert f"told to stop: saved step {last}" in ranks.output(0)
    assert_goes_on(run, tmp_path, 2, base, at=last)


@pytest.mark.parametrize("strategy, rank", [("ddp", 0), ("fsdp", 1)])
def test_the_disk_is_full(tmp_path, strategy, rank) -> None:
    run = tmp_path / "run"
    base = run_config({"strategy": strategy}, steps=6, checkpoint_every=2)
    arguments = (base, run, rank, range(2, 4))
    run_ranks(2, tmp_path / "logs", train_on_a_full_disk, *arguments)
    (failure,) = [r for r in records(run) if r.get("event") == "save_failed"]
    assert failure["step"] == 6 and "checkpoint 4 could not be written" in failure["reason"]
    assert "too large" in failure["reason"]
    # Training went on, and the next checkpoint could be written again.
    assert steps(run) == [1, 2, 3, 4, 5, 6] and saved(run) == [2, 6]
    assert not list((run / "checkpoints").glob("*.tmp-*"))
    assert_goes_on(run, tmp_path, 2, base, at=6)


def test_the_disk_is_full_at_the_end(tmp_path) -> None:
    run = tmp_path / "run"
    base = run_config(steps=4, checkpoint_every=2)
    with Ranks(2, tmp_path / "logs", train_on_a_full_disk, base, run, 1, range(3, 9)) as ranks:
        assert ranks.exit_codes() == [1, 1]
        for rank in (0, 1):
            assert "SaveFailed: checkpoint 4 could not be written: rank 1: " in ranks.output(rank)
    assert saved(run) == [2]
    assert_goes_on(run, tmp_path, 2, base, at=2)


@pytest.mark.parametrize("damage", ["truncated", "a bit flipped", "metadata", "missing"])
def test_a_damaged_checkpoint(tmp_path, damage) -> None:
    run = tmp_path / "run"
    base = run_config(steps=4, checkpoint_every=2)
    run_ranks(2, tmp_path / "logs", train, base, run)
    shards = run / "checkpoints" / "00000004" / "shards"
    path = shards / (".metadata" if damage == "metadata" else "__1_0.distcp")
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    # On fewer ranks than wrote it, each of which reads more than its own file.
    assert_goes_on(run, tmp_path, 2, base, at=2)
    (event,) = [r for r in records(run) if r.get("event") == "damaged_checkpoint"]
    what = "missing" if damage == "missing" else "damaged"
    assert event["reason"].startswith(f"{path} is {what}")
    output = (tmp_path / "resumed" / "0.txt").read_text()
    assert f"{path} is {what}" in output and "going on from step 2" in output
    assert (run / "checkpoints" / "00000004.damaged-0").is_dir()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_not_finite_on_one_rank_only(tmp_path, strategy) -> None:
    base = run_config({"strategy": strategy}, steps=8, batch_size=12)
    results = run_ranks(2, tmp_path / "logs", train_with_a_bad_image, base, tmp_path / "run")
    alone = train_with_a_bad_image(run_config({}, steps=8, batch_size=12), tmp_path / "alone")
    assert alone["skipped"] == 2
    for result in results:
        assert result["changed"] == alone["changed"] and result["skipped"] == 2
        for name, value in alone["weights"].items():
            error = (result["weights"][name] - value).norm() / value.norm().clamp(min=1e-12)
            assert error < 1e-4, f"{name}: {error}"
    # Each time one of them alone had the image.
    assert [sum(seen) for seen in zip(*(r["seen"] for r in results), strict=True)] == [
        int(not changed) for changed in alone["changed"]
    ]


def test_a_rank_that_hangs_is_named(tmp_path) -> None:
    run = tmp_path / "run"
    # Longer than a busy machine holds a rank up.
    base = run_config({"timeout": 8.0, "strategy": "fsdp"}, steps=10_000, checkpoint_every=3)
    with Ranks(4, tmp_path / "logs", train_slowly, base, run, 0.02) as ranks:
        wait_for(lambda: 3 in saved(run))
        ranks.send(2, signal.SIGSTOP)
        wait_for(lambda: all(not p.is_alive() for i, p in enumerate(ranks.processes) if i != 2))
        hanging = ranks.processes[2].pid
    told = []
    for rank in (0, 1, 3):
        last = ranks.output(rank).splitlines()[-1]
        if ranks.processes[rank].exitcode != HANGS:
            # Another one was quicker, and its end broke the connection: it has said it all.
            assert "Connection closed by peer" in last
            continue
        told.append(rank)
        assert f"rank {rank}: no progress for 8 s; rank 2 (process {hanging} on " in last
        assert f"while rank {rank} is in" in last
    assert told
    assert_goes_on(run, tmp_path, 2, base, at=saved(run)[-1])


@pytest.mark.parametrize("ranks_of_the_second", [1, 2])
def test_two_runs_in_one_directory(tmp_path, ranks_of_the_second) -> None:
    run = tmp_path / "run"
    base = run_config(steps=10_000, checkpoint_every=5000)
    with Ranks(2, tmp_path / "logs", train_slowly, base, run, 0.02) as ranks:
        wait_for(lambda: len(steps(run)) >= 2)
        logs = tmp_path / "second"
        errors = run_ranks(ranks_of_the_second, logs, try_to_train, base, run, True)
        before = len(steps(run))
        wait_for(lambda: len(steps(run)) > before)
        ranks.send(0, signal.SIGTERM)
        assert ranks.exit_codes() == [0, 0]
        owner = ranks.processes[0].pid
    for error in errors:
        assert error.startswith(f"BlockingIOError: {run} is being trained by process {owner} on ")
    assert not (run / "run.lock").exists()


@pytest.mark.parametrize(
    ("train", "parallel", "message"),
    [
        ({"cuda_graph": True}, {}, "train.cuda_graph needs one process, got 2 ranks"),
        ({"accumulate": 2, "batch_size": 6}, {}, "train.batch_size must be a multiple of "),
        ({}, {"backend": "nccl"}, "parallel.backend nccl needs train.device cuda, got a CPU"),
        ({}, {"strategy": "hybrid", "shard_size": 3}, "parallel.shard_size must divide "),
    ],
)
def test_what_several_ranks_cannot_do(tmp_path, train, parallel, message) -> None:
    base = run_config(parallel, **train)
    arguments = (base, tmp_path / "run")
    found = run_ranks(2, tmp_path / "logs", what_a_refused_run_tells, *arguments)
    for error, _ in found:
        assert error.startswith(f"ValueError: {message}") and "\n" not in error
    assert [told for _, told in found] == ["told\n", ""]
    assert not (tmp_path / "run").exists()


def test_ranks_with_different_data(tmp_path) -> None:
    arguments = (run_config(), tmp_path / "run")
    for error in run_ranks(2, tmp_path / "logs", try_to_train_on_other_data, *arguments):
        assert error == "all ranks must have the same data, got [60, 59] images"
    assert not (tmp_path / "run").exists()
