import pytest
import torch
from contract import ForwardBackward, Tangent
from modes import PairModes

from tim import ops


def angles(tokens: int, head_dim: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    angle = torch.randn(tokens, head_dim // 2, generator=generator, dtype=torch.float64) * 3
    angle = angle.repeat_interleave(2, dim=1)
    return angle.cos(), angle.sin()


class TestQkNormRope(ForwardBackward, Tangent, PairModes):
    name = "qk_norm_rope"
    in_graph = ("qk_norm_rope",)
    op = staticmethod(ops.qk_norm_rope)
    reference = staticmethod(ops.qk_norm_rope_reference)
    # (B, N, H, D): TiM-XL has D = 72, TiM-B has 64
    sizes = (
        (2, 3, 2, 8),
        (1, 1, 1, 2),
        (2, 5, 3, 72),
        (2, 16, 4, 64),
        (0, 4, 2, 8),
        (1, 7, 1, 256),
    )
    differentiable = (0, 1, 2, 3, 4)
    with_tangent = (0,)

    def inputs(self, size, generator):
        batch, tokens, heads, head_dim = size
        qkv = torch.randn(
            batch, tokens, 3, heads, head_dim, generator=generator, dtype=torch.float64
        )
        parameters = [
            start + 0.3 * torch.randn(head_dim, generator=generator, dtype=torch.float64)
            for start in (1, 0, 1, 0)
        ]
        return [qkv, *parameters, *angles(tokens, head_dim, generator)]


def make(batch=2, tokens=4, heads=3, head_dim=16):
    contract = TestQkNormRope()
    return contract.prepare((batch, tokens, heads, head_dim), torch.float32)[0]


def test_rotation_keeps_the_length_of_every_pair():
    qkv, _, _, _, _, cos, sin = make()
    weight, bias = torch.ones(16), torch.zeros(16)
    q, _, v = ops.qk_norm_rope(qkv, weight, bias, weight, bias, cos, sin)
    norm = torch.nn.functional.layer_norm(qkv[:, :, 0], (16,))
    torch.testing.assert_close(
        q.unflatten(-1, (-1, 2)).norm(dim=-1), norm.unflatten(-1, (-1, 2)).norm(dim=-1)
    )
    assert torch.equal(v, qkv[:, :, 2])


def test_quarter_turn_maps_a_b_to_minus_b_a():
    qkv, *_ = make(1, 1, 1, 4)
    weight, bias = torch.ones(4), torch.zeros(4)
    cos, sin = torch.zeros(1, 4), torch.ones(1, 4)
    q, _, _ = ops.qk_norm_rope(qkv, weight, bias, weight, bias, cos, sin)
    a, b, c, d = torch.nn.functional.layer_norm(qkv[0, 0, 0, 0], (4,))
    torch.testing.assert_close(q.flatten(), torch.stack((-b, a, -d, c)))


def test_tokens_of_a_longer_sequence_are_read_in_place():
    qkv, *others, cos, sin = make(tokens=9)
    part = qkv[:, 2:7]
    actual = ops.qk_norm_rope(part, *others, cos[:5], sin[:5])
    expected = ops.qk_norm_rope_reference(part, *others, cos[:5], sin[:5])
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    swapped = qkv.transpose(0, 1)[:4].transpose(0, 1)
    actual = ops.qk_norm_rope(swapped, *others, cos[:4], sin[:4])
    expected = ops.qk_norm_rope_reference(swapped, *others, cos[:4], sin[:4])
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_half_precision_tokens_with_float32_parameters():
    qkv, *others = make()
    q, k, v = ops.qk_norm_rope(qkv.bfloat16(), *others)
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16


def test_a_tangent_of_a_weight_is_exact():
    inputs = make()
    t_weight = torch.randn(16)

    def of_weight(function):
        return torch.func.jvp(
            lambda weight: function(inputs[0], weight, *inputs[2:])[0], (inputs[1],), (t_weight,)
        )[1]

    actual = of_weight(ops.qk_norm_rope)
    assert actual.abs().max() > 0
    torch.testing.assert_close(actual, of_weight(ops.qk_norm_rope_reference))


def test_angles_that_want_gradients_get_them():
    inputs = make()
    inputs[5].requires_grad_()
    q, _, _ = ops.qk_norm_rope(*inputs)
    q.square().sum().backward()
    assert inputs[5].grad.abs().max() > 0


def test_bad_input():
    qkv, *others, cos, sin = make()
    with pytest.raises(ValueError, match=r"qkv must have shape \[B, N, 3, H, D\] with even D"):
        ops.qk_norm_rope(qkv[..., :15], *others, cos, sin)
    with pytest.raises(ValueError, match="eps must be at least 0, got -1"):
        ops.qk_norm_rope(qkv, *others, cos, sin, eps=-1)
    with pytest.raises(ValueError, match=r"cos must have shape \[N, D\] = \[4, 16\]"):
        ops.qk_norm_rope(qkv, *others, cos[:3], sin)
    with pytest.raises(ValueError, match=r"k_bias must have shape \[D\] = \[16\], got \[15\]"):
        ops.qk_norm_rope(qkv, *others[:3], torch.ones(15), cos, sin)
