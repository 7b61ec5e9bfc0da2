"""Faults that AddressSanitizer and UBSan find, in the build that runs under them (.ci/run)."""

import subprocess
import sys
from pathlib import Path

import pytest
from emulated import SANITIZE

FAULTS = {
    "pass_on_out_of_bounds": "heap-buffer-overflow",
    "broadcast_out_of_bounds": "heap-buffer-overflow",
    "reverse_beyond_end": "heap-buffer-overflow",
    "reverse_before_start": "heap-buffer-overflow",
    "reverse_misaligned": "misaligned address",
    "pass_on": None,
    "reverse": None,
}
SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
import torch
from emulated import module
x, out = torch.ones(192), torch.ones(192)
getattr(module("tim_test_kernels"), {name!r})(x.data_ptr(), out.data_ptr())
"""


@pytest.mark.skipif(SANITIZE == "OFF", reason="not run under the sanitizers")
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_ends_the_process(name) -> None:
    script = SCRIPT.format(folder=str(Path(__file__).parent), name=name)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if FAULTS[name] is None:
        assert result.returncode == 0, result.stderr
    else:
        assert result.returncode != 0 and FAULTS[name] in result.stderr, result.stderr
