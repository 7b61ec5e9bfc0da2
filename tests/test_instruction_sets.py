"""The copies of the CPU kernels that this machine does not pick pass the operations' tests too.

A process loads one copy for life, so each gets its own, chosen by the variable TIM_ISA.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tim import _extension

TESTS = Path(__file__).parent
OPS = ("adaln", "attention", "interpolate", "qk_norm_rope", "swiglu", "transition_loss")

if _extension.C is None:
    pytest.skip(_extension.REASON, allow_module_level=True)


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "TIM_ISA": isa},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )


def chosen(isa: str) -> subprocess.CompletedProcess:
    return run(isa, "-c", "import torch; from tim import _C; print(_C.cpu.isa())")


OTHERS = [isa for isa in _extension.build_info()["isa"] if isa != _extension.C.cpu.isa()]


@pytest.mark.parametrize("isa", OTHERS)
def test_the_operations_pass_with(isa):
    result = chosen(isa)
    if "this processor lacks these instructions" in result.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert result.stdout.strip() == isa, result.stderr
    files = [str(TESTS / "ops" / f"test_{name}.py") for name in OPS]
    # What torch.compile makes of an operation does not depend on the kernels.
    only = "cpu and (forward or backward or tangent) and not compile"
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", only)
    result = run(isa, "-m", "pytest", *options, *files)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


def test_an_unknown_name_is_refused():
    result = chosen("sse9")
    assert result.returncode != 0
    assert "TIM_ISA must be one of " in result.stderr
    assert "avx2, baseline, got sse9" in result.stderr
