"""Memory of attention with its tangent and its backward pass, as a process of its own uses it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the resident set")

PEAK = """
import json, pathlib, torch
from tim import ops
n, m, heads, head_dim, dtype = {n}, {m}, {heads}, {head_dim}, torch.{dtype}
q, t_q = (torch.randn(1, n, heads, head_dim).to(dtype) for _ in range(2))
k, v, t_k, t_v = (torch.randn(1, m, heads, head_dim).to(dtype) for _ in range(4))
me = pathlib.Path("/proc/self")

def resident(name):
    (line,) = (l for l in (me / "status").read_text().splitlines() if l.startswith(name))
    return int(line.split()[1]) * 1024

def grown(function):
    (me / "clear_refs").write_text("5")  # the highest resident set from now on
    before = resident("VmRSS")
    result = function()
    return result, resident("VmHWM") - before

def gradients(leaves, g):
    for x in leaves:
        x.requires_grad_()
    ops.attention(*leaves).backward(g)

few = [x[:, :8].clone() for x in (q, k, v, t_q, t_k, t_v)]
torch.func.jvp(ops.attention, tuple(few[:3]), tuple(few[3:]))
gradients(few[:3], few[3])
(out, t_out), tangent = grown(lambda: torch.func.jvp(ops.attention, (q, k, v), (t_q, t_k, t_v)))
rows = torch.tensor([0, n // 2, n - 1])
q_, t_ = (x[:, rows].double() for x in (q, t_q))
kv, t_kv = ([x.double() for x in some] for some in ((k, v), (t_k, t_v)))
exact = torch.func.jvp(ops.attention_reference, (q_, *kv), (t_, *t_kv))
if dtype == torch.float32:
    for a, e in zip((out, t_out), exact):
        torch.testing.assert_close(a[:, rows].double(), e, rtol=1e-4, atol=1e-6)
backward = 0
if {backward}:
    _, backward = grown(lambda: gradients((q, k, v), t_q))
    assert k.grad.isfinite().all() and k.grad.abs().max() > 0
print(json.dumps([tangent, backward]))
"""


def growth(
    *, n: int, m: int, heads: int, head_dim: int, dtype: str = "float32", backward: bool = False
) -> list[int]:
    """Bytes by which the resident set grows at most in a call with tangents, and in a call with
    its backward pass: results, and what is there only on the way. Some rows are checked.
    """
    script = PEAK.format(n=n, m=m, heads=heads, head_dim=head_dim, dtype=dtype, backward=backward)
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    return json.loads(output.stdout)


@pytest.mark.parametrize(
    "sizes",
    [
        {"n": 4096, "m": 4096, "heads": 4, "head_dim": 32},
        {"n": 65536, "m": 2000, "heads": 1, "head_dim": 64},
        {"n": 200, "m": 65536, "heads": 1, "head_dim": 64},
    ],
    ids=str,
)
def test_memory_of_the_tangent_is_the_results_and_tiles(sizes):
    grown, _ = growth(**sizes)
    scores = sizes["heads"] * sizes["n"] * sizes["m"] * 4
    results = sizes["heads"] * sizes["n"] * (2 * sizes["head_dim"] + 1) * 4
    assert grown < scores / 4, (
        f"{grown / 2**20:.0f} MiB, one score matrix is {scores / 2**20:.0f} MiB"
    )
    # The results, and tiles of a size that the sequence has no part in.
    assert 0 < grown < 1.5 * results + 2**23


def test_memory_of_tangent_and_backward_grows_with_the_sequence_not_its_square():
    lengths = (4096, 12288)
    short, long = (
        growth(n=n, m=n, heads=1, head_dim=16, dtype="bfloat16", backward=True) for n in lengths
    )
    scores = 2 * lengths[1] ** 2
    for name, less, more in zip(("tangent", "backward"), short, long, strict=True):
        # Pages and pools of the allocator come in lumps.
        assert 0 < more < 3 * less + 2**23 < scores / 4, f"{name}: {less} and {more} bytes"
