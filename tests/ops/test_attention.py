import math
import subprocess
import sys

import pytest
import torch
from contract import ForwardBackward, Tangent
from hypothesis import given, settings
from hypothesis import strategies as st

from tim import ops


class TestAttention(ForwardBackward, Tangent):
    name = "attention"
    op = staticmethod(ops.attention)
    reference = staticmethod(ops.attention_reference)
    # (B, N, M, H, D)
    sizes = (
        (2, 5, 3, 2, 8),
        (1, 1, 1, 1, 4),
        (2, 16, 16, 6, 64),
        (1, 67, 130, 2, 72),
        (0, 4, 4, 2, 8),
    )
    differentiable = (0, 1, 2)
    with_tangent = (0, 1, 2)

    def skip_unless(self, path, dtype):
        # The kernels are PyTorch's: "cpu" means scaled_dot_product_attention and the tiled tangent.
        if path == "cuda" and not torch.cuda.is_available():
            pytest.skip("no GPU")
        return "cuda" if path == "cuda" else "cpu"

    def inputs(self, size, generator):
        batch, n, m, heads, head_dim = size
        return [
            torch.randn(batch, rows, heads, head_dim, generator=generator, dtype=torch.float64)
            for rows in (n, m, m)
        ]

    def test_second_derivatives_raise_instead_of_being_dropped(self):
        pytest.skip("forward and backward are PyTorch's own, with PyTorch's rules")


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 400))
def test_tiles_of_any_size_give_the_same_tangent(n, m, tile):
    # tim.ops.attention is the function; its module is reached by its full name.
    module = sys.modules["tim.ops.attention"]
    generator = torch.Generator().manual_seed(n + 10 * m)
    shapes = [(2, rows, 2, 4) for rows in (n, m, m)]
    qkv = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    tangents = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    before = module.TILE_ELEMENTS
    try:
        module.TILE_ELEMENTS = {"cpu": tile}
        _, actual = torch.func.jvp(ops.attention, tuple(qkv), tuple(tangents))
    finally:
        module.TILE_ELEMENTS = before
    _, expected = torch.func.jvp(ops.attention_reference, tuple(qkv), tuple(tangents))
    torch.testing.assert_close(actual, expected)


def test_packed_sequences_do_not_see_each_other():
    lengths_q, lengths_k = (3, 1, 5), (2, 4, 5)
    q = torch.randn(1, sum(lengths_q), 2, 8)
    k, v = (torch.randn(1, sum(lengths_k), 2, 8) for _ in range(2))
    t_q = torch.randn_like(q)
    offsets_q, offsets_k = (
        torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        for lengths in (lengths_q, lengths_k)
    )

    def packed(q):
        return ops.attention(q, k, v, cu_seqlens_q=offsets_q, cu_seqlens_k=offsets_k)

    out, t_out = torch.func.jvp(packed, (q,), (t_q,))
    for i in range(3):
        a, b, c, d = (*offsets_q[i : i + 2].tolist(), *offsets_k[i : i + 2].tolist())
        expected = torch.func.jvp(
            lambda q, c=c, d=d: ops.attention_reference(q, k[:, c:d], v[:, c:d]),
            (q[:, a:b],),
            (t_q[:, a:b],),
        )
        torch.testing.assert_close((out[:, a:b], t_out[:, a:b]), expected, rtol=1e-4, atol=1e-5)


def test_large_logits_do_not_overflow():
    q, k, v = (torch.randn(1, 6, 1, 8) for _ in range(3))
    out, t_out = torch.func.jvp(lambda q: ops.attention(q, k, v, scale=300.0), (q,), (q,))
    assert out.isfinite().all() and t_out.isfinite().all()


def test_strided_inputs():
    q, k, v = torch.randn(2, 3, 7, 3, 8).transpose(1, 2).unbind(3)
    out, t_out = torch.func.jvp(lambda q: ops.attention(q, k, v), (q,), (q,))
    expected = torch.func.jvp(lambda q: ops.attention_reference(q, k, v), (q,), (q,))
    torch.testing.assert_close((out, t_out), expected, rtol=1e-4, atol=1e-5)


PEAK = """
import resource, torch
from tim import ops
tokens = {tokens}
q, k, v = (torch.randn(1, tokens, 4, 32) for _ in range(3))
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.func.jvp(ops.attention, (q[:, :8], k[:, :8], v[:, :8]), (q[:, :8], k[:, :8], v[:, :8]))
before = peak()
torch.func.jvp(ops.attention, (q, k, v), (v, q, k))
print(peak() - before)
"""


def test_memory_of_the_tangent_is_linear_in_the_sequence_length():
    def growth(tokens: int) -> int:
        script = PEAK.format(tokens=tokens)
        output = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout
        return int(output)

    tokens, heads, head_dim = 4096, 4, 32
    scores = heads * tokens * tokens * 4
    tensor = heads * tokens * head_dim * 4
    grown = growth(tokens)
    # Copies of q, k, v, o, their tangents and the results: tens of tensors, not one score matrix.
    assert grown < scores / 4, (
        f"{grown / 2**20:.0f} MiB, one score matrix is {scores / 2**20:.0f} MiB"
    )
    assert grown < 24 * tensor + 2**23


def test_default_scale():
    q, k, v = (torch.randn(1, 4, 2, 16) for _ in range(3))
    torch.testing.assert_close(
        ops.attention(q, k, v), ops.attention(q, k, v, scale=1 / math.sqrt(16))
    )


def test_bad_input():
    q = torch.ones(2, 3, 2, 4)
    with pytest.raises(ValueError, match=r"k must have shape \[B, M, H, D\] = \[2, M, 2, 4\]"):
        ops.attention(q, q[..., :3], q[..., :3])
    with pytest.raises(ValueError, match="v must have shape that of k"):
        ops.attention(q, q, q[:, :2])
    with pytest.raises(ValueError, match="M = 0"):
        ops.attention(q, q[:, :0], q[:, :0])
    with pytest.raises(
        ValueError, match="backend must be one of auto, sdpa, reference, got 'fast'"
    ):
        ops.attention(q, q, q, backend="fast")
    offsets = torch.tensor([0, 3])
    with pytest.raises(ValueError, match="needs packed inputs with B = 1, got B = 2"):
        ops.attention(q, q, q, cu_seqlens_q=offsets, cu_seqlens_k=offsets)
    with pytest.raises(ValueError, match=r"cu_seqlens_k must ascend from 0 to 3, got \[0, 4\]"):
        ops.attention(q[:1], q[:1], q[:1], cu_seqlens_q=offsets, cu_seqlens_k=torch.tensor([0, 4]))
