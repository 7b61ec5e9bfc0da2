"""Other people's attention: what the figures of bench_attention.py are compared with.

Each takes q, k, v [B, N, H, D] as `tim.ops.attention` does, plain tensors or dual numbers; its
backward pass is its own. A peer is there where it can run; one that fails at a size or in a dtype
leaves a note in the row.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tim import ops
from tim.ops import _attention_forward
from tim.ops._attention_hopper import VERSIONS, hopper
from tim.ops._table import has_kernel

#: Backends of scaled_dot_product_attention by device; MATH stores the scores, and is the only one
#: with a forward-mode derivative.
SDPA_BACKENDS = {
    "cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
    "cuda": (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ),
}
#: Head dimensions that jvp-flash-attention takes; others are padded to the next one.
TRITON_HEAD_DIMS = (16, 32, 64, 128, 256)


def rivals(operation: str, direction: str, device: torch.device) -> dict[str, Callable]:
    """The peers of one direction by name."""
    if operation != "attention":
        return {}
    found: dict[str, Callable] = {"plain": plain}
    if direction == "tangent":
        found["sdpa math"] = sdpa(SDPBackend.MATH)
        # Our tangent from PyTorch's output and log-sum-exp.
        found["tim, sdpa forward"] = lambda q, k, v: ops.attention(q, k, v, backend="sdpa")
    else:
        for backend in SDPA_BACKENDS[device.type]:
            name = backend.name.removesuffix("_ATTENTION").lower()
            found[f"sdpa {name}"] = sdpa(backend)
    if device.type != "cuda":
        return found
    if hopper_there(device):
        found["tim, hopper"] = by_hopper("kernel")
        if direction == "tangent":
            found["tim, hopper, sdpa forward"] = by_hopper("sdpa")
    if direction != "tangent" and flash_attn() is not None:
        found["flash_attn"] = by_flash_attn
    if direction == "tangent" and flash_attn() is not None:
        found["tim, flash_attn forward"] = lambda q, k, v: ops.attention(
            q, k, v, backend="flash_attn"
        )
    if importlib.util.find_spec("jvp_flash_attention") is not None:
        found["jvp_flash_attention"] = by_jvp_flash_attention
    return found


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As the public code of the paper has it for its exact derivative: N x N scores."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).contiguous()


def sdpa(backend: SDPBackend) -> Callable:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2).contiguous()

    return attention


def hopper_there(device: torch.device) -> bool:
    """Whether our kernels for Hopper can run: the benchmark measures them beside the others."""
    there = all(has_kernel(version, device.type) for version in VERSIONS.values())
    return there and torch.cuda.get_device_capability(device) == (9, 0)


def by_hopper(backend: str) -> Callable:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with hopper("on"):
            return ops.attention(q, k, v, backend=backend)

    return attention


def flash_attn() -> object | None:
    """The installed interface of flash-attn for this GPU."""
    return _attention_forward.flash_module(torch.cuda.get_device_capability())


def by_flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = flash_attn().flash_attn_func(q, k, v)
    return out[0] if isinstance(out, tuple) else out


def by_jvp_flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By its entry point for dual numbers, which torch.func.jvp needs."""
    attention = importlib.import_module("jvp_flash_attention.jvp_attention").JVPAttn
    head_dim = q.shape[-1]
    padded = next(width for width in TRITON_HEAD_DIMS if width >= head_dim)
    q, k, v = (F.pad(x, (0, padded - head_dim)).transpose(1, 2) for x in (q, k, v))
    out = attention.fwd_dual(q, k, v, sm_scale=head_dim**-0.5)
    return out[..., :head_dim].transpose(1, 2).contiguous()
