"""The command of the documentation, as its reader gives it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import records, wait_for

from tim.checkpoint import checkpoints

pytestmark = pytest.mark.slow

#: torchrun reads --run as an abbreviation of its own --run-path until "--" ends its options.
LAUNCHER = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--",
]  # fmt: skip


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_torchrun_trains_and_ends_cleanly(tmp_path: Path, strategy: str) -> None:
    flags = ["--run", str(tmp_path / "run"), "--train.steps", "4", "--train.log-every", "2",
             "--train.sample-every", "0", "--train.batch-size", "8",
             "--parallel.strategy", strategy]  # fmt: skip
    command = [*LAUNCHER, "tim", "train", "digits", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "terminate called" not in done.stderr and "destroy_process_group" not in done.stderr
    assert "Warning" not in done.stderr
    steps = [r["step"] for r in records(tmp_path / "run") if "denoising" in r]
    assert steps == [2, 4]
    assert done.stderr.count("trained 4 steps") + done.stdout.count("trained 4 steps") >= 1


def test_a_refused_run_is_one_line_and_code_2(tmp_path: Path) -> None:
    flags = ["--run", str(tmp_path / "run"), "--train.batch-size", "7"]
    done = subprocess.run(
        [*LAUNCHER, "tim", "train", "digits", *flags], capture_output=True, text=True, timeout=300
    )
    told = "tim train: train.batch_size must be a multiple of train.accumulate = 1 times 2 ranks"
    assert done.stderr.count("tim train:") == 1 and told in done.stderr, done.stderr
    # torchrun's own code is 1; it tells that of the first rank that ended.
    assert "(exitcode: 2)" in done.stderr and "terminate called" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_sigterm_on_torchrun_saves(tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ["--run", str(run), "--train.steps", "100000", "--train.log-every", "2",
             "--train.sample-every", "0", "--train.batch-size", "8"]  # fmt: skip
    with subprocess.Popen(
        [*LAUNCHER, "tim", "train", "digits", *flags], stderr=subprocess.PIPE, text=True
    ) as launcher:
        try:
            wait_for(lambda: len(records(run)) >= 3, seconds=200)
            launcher.send_signal(signal.SIGTERM)
            _, told = launcher.communicate(timeout=60)
        finally:
            launcher.kill()
    (last,) = [r["step"] for r in records(run) if r.get("event") == "terminated"]
    assert [int(path.name) for path in checkpoints(run / "checkpoints")] == [last]
    assert told.count(f"told to stop: saved step {last}") == 1
    # No rank was killed.
    assert "SIGKILL" not in told and "ChildFailedError" not in told
