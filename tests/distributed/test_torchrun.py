"""The command of the documentation, as its reader gives it."""

import subprocess
import sys
from pathlib import Path

import pytest
from ranks import records

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_torchrun_trains_and_ends_cleanly(tmp_path: Path, strategy: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    flags = ["--run", str(tmp_path / "run"), "--train.steps", "4", "--train.log-every", "2",
             "--train.sample-every", "0", "--train.batch-size", "8",
             "--parallel.strategy", strategy]  # fmt: skip
    # torchrun reads --run as an abbreviation of its own --run-path until "--" ends its options.
    command = [*launcher, "-m", "--", "tim", "train", "digits", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "terminate called" not in done.stderr and "destroy_process_group" not in done.stderr
    steps = [r["step"] for r in records(tmp_path / "run") if "denoising" in r]
    assert steps == [2, 4]
    assert done.stderr.count("trained 4 steps") + done.stdout.count("trained 4 steps") >= 1
