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
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from tim import ops
from tim.ops import _attention_forward
from tim.ops._attention_hopper import VERSIONS, hopper
from tim.ops._table import has_kernel
from tim.ops.attention import FASTEST_FORWARD

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
#: Head dimensions of jvp-flash-attention and rCM's kernel; others are padded to the next one.
TRITON_HEAD_DIMS = (16, 32, 64, 128, 256)
#: rCM's kernel: a file of https://github.com/NVlabs/rcm, which is not packaged. It is there when a
#: clone is on PYTHONPATH, and needs flash-attn and einops.
RCM = "rcm.utils.flash_attention_jvp_triton"


def rivals(operation: str, direction: str, device: torch.device) -> dict[str, Callable]:
    """The peers of one direction by name."""
    if operation != "attention":
        return {}
    found: dict[str, Callable] = {"plain": plain}
    fastest = FASTEST_FORWARD[device.type]  # what the row's own candidate takes
    if direction == "tangent":
        found["sdpa math"] = sdpa(SDPBackend.MATH)
        # Our tangent from PyTorch's output and log-sum-exp.
        if fastest != "sdpa":
            found["tim, sdpa forward"] = by_kernels("sdpa")
    else:
        for backend in SDPA_BACKENDS[device.type]:
            name = backend.name.removesuffix("_ATTENTION").lower()
            found[f"sdpa {name}"] = sdpa(backend)
    if device.type != "cuda":
        return found
    if fastest != "kernel":
        found["tim, kernel"] = by_kernels("kernel")
    if hopper_there(device):
        found["tim, hopper"] = by_kernels("kernel", hopper_versions="on")
        if direction == "tangent":
            found["tim, hopper, sdpa forward"] = by_kernels("sdpa", hopper_versions="on")
    if direction != "tangent" and flash_attn() is not None:
        found["flash_attn"] = by_flash_attn
    if direction == "tangent" and flash_attn() is not None:
        found["tim, flash_attn forward"] = by_kernels("flash_attn")
    if importlib.util.find_spec("jvp_flash_attention") is not None:
        found["jvp_flash_attention"] = by_jvp_flash_attention
    if direction == "tangent" and importlib.util.find_spec(RCM.partition(".")[0]) is not None:
        found["rcm"] = by_rcm
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


def by_kernels(backend: str, hopper_versions: str = "off") -> Callable:
    """Our attention with a forward pass by `backend`, on the kernels for all GPUs or for Hopper."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with hopper(hopper_versions):
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
    out = attention.fwd_dual(*map(for_triton, (q, k, v)), sm_scale=head_dim**-0.5)
    return out[..., :head_dim].transpose(1, 2).contiguous()


def by_rcm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Output and tangent by a function of both, which is what it has: it knows no dual numbers."""
    attention = importlib.import_module(RCM).attention
    head_dim = q.shape[-1]
    duals = [forward_ad.unpack_dual(for_triton(x)) for x in (q, k, v)]
    primals, tangents = zip(*duals, strict=True)
    results = attention(*primals, *tangents, False, head_dim**-0.5)
    return forward_ad.make_dual(*(x[..., :head_dim].transpose(1, 2).contiguous() for x in results))


def for_triton(x: Tensor) -> Tensor:
    """[B, H, N, D] of [B, N, H, D], with D padded to one that the kernels take."""
    padded = next(width for width in TRITON_HEAD_DIMS if width >= x.shape[-1])
    return F.pad(x, (0, padded - x.shape[-1])).transpose(1, 2)
