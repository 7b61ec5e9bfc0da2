"""Attention's output with its log-sum-exp L from other people's kernels.

The tangent and the gradient need L. Where a library gives none, or none of the expected shape, it
is computed from q and k, so that it is always there and always that of these scores.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from tim.ops._attention_tiled import log_sum_exp

#: Modules of flash-attn and the oldest and newest compute capabilities that each is made for, the
#: preferred one first: FlashAttention 3, 4 and 2.
FLASH_MODULES = {
    "flash_attn_interface": ((9, 0), (9, 0)),
    "flash_attn_3.flash_attn_interface": ((9, 0), (9, 0)),
    "flash_attn.cute": ((9, 0), (11, 9)),
    "flash_attn": ((8, 0), (12, 9)),
}
FLASH_DTYPES = (torch.bfloat16, torch.float16)
#: Where PyTorch is faster than our CPU kernels, in float32 (docs/attention.md): forward where fewer
#: queries than this meet so many keys; backward where there is one query or one key, or one head of
#: one sample (our kernel works on different heads at a time) of more multiply-adds than this.
FEW_QUERIES, MANY_KEYS = 4, 16
ONE_HEAD = 1 << 23


def by_sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, N, H, D] and L [B, H, N] by the backend that PyTorch's attention would choose."""
    operands = [_unit_stride(x).transpose(1, 2) for x in (q, k, v)]
    if q.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(*operands, 0.0, False, scale=scale)
    else:
        out, lse = _by_sdpa_on_cuda(*operands, scale)
    return out.transpose(1, 2).contiguous(), _checked(lse, q, k, scale)


def sdpa_is_faster(q: Tensor, k: Tensor) -> bool:
    """Whether `by_sdpa` was measured to take less time than our kernel."""
    if not q.is_cpu or q.dtype != torch.float32:
        return False
    return q.shape[1] < FEW_QUERIES and k.shape[1] >= MANY_KEYS


def sdpa_backward_is_faster(q: Tensor, k: Tensor) -> bool:
    """Whether `backward_by_sdpa` was measured to take less time than our kernel."""
    if q.device.type != "cpu" or q.dtype != torch.float32:
        return False
    batch, tokens, heads, head_dim = q.shape
    if tokens == 1 or k.shape[1] == 1:
        return True
    return batch * heads == 1 and tokens * k.shape[1] * head_dim > ONE_HEAD


def backward_by_sdpa(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v on a CPU, from an output and L of whatever forward pass."""
    operands = [_unit_stride(x).transpose(1, 2) for x in (grad, q, k, v, out)]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    gradients = flash(*operands, lse, 0.0, False, scale=scale)
    return tuple(gradient.transpose(1, 2).contiguous() for gradient in gradients)


def _by_sdpa_on_cuda(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    choice = torch.nn.attention.SDPBackend(
        torch._fused_sdp_choice(q, k, v, None, 0.0, False, scale=scale)
    )
    aten, options = torch.ops.aten, torch.nn.attention.SDPBackend
    if choice == options.FLASH_ATTENTION and q.shape[-1] % 8 == 0:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, scale=scale)[:2]
    if choice == options.CUDNN_ATTENTION:
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)[:2]
    if choice == options.EFFICIENT_ATTENTION:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, scale=scale
        )
        return out, lse[..., : q.shape[2]]  # padded to whole tiles
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale), None


def by_flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_q: int,
    max_k: int,
) -> tuple[Tensor, Tensor]:
    """The same by flash-attn, of any of its interfaces; packed sequences too."""
    module = flash_module(torch.cuda.get_device_capability(q.device))
    assert module is not None, "asked for without why_no_flash_attn"
    if cu_seqlens_q is None:
        out, lse = _call(module.flash_attn_func, (q, k, v), scale)
        return out.contiguous(), _checked(lse, q, k, scale)
    packed = {
        "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_q, "max_seqlen_k": max_k,
    }  # fmt: skip
    out, lse = _call(module.flash_attn_varlen_func, (q[0], k[0], v[0]), scale, **packed)
    if lse is None or lse.shape != (q.shape[2], q.shape[1]):
        raise NotImplementedError(
            "flash_attn gives no log-sum-exp of packed sequences in this version; backend='kernel' "
            "takes them"
        )
    return out[None].contiguous(), lse[None].float().contiguous()


def _call(
    function: Callable, operands: tuple[Tensor, ...], scale: float, **packed: object
) -> tuple[Tensor, Tensor | None]:
    """Output and L: the interfaces differ in the argument that asks for L, if any."""
    parameters = inspect.signature(function).parameters
    ask = {name: True for name in ("return_lse", "return_attn_probs") if name in parameters}
    result = function(*operands, softmax_scale=scale, causal=False, **packed, **ask)
    if not isinstance(result, tuple):
        return result, None
    return result[0], result[1]


def why_no_flash_attn(q: Tensor) -> str | None:
    """Reason why flash-attn cannot take tensors like q."""
    if q.device.type != "cuda":
        return f"flash_attn runs on CUDA devices, got {q.device.type}"
    if q.dtype not in FLASH_DTYPES:
        return f"flash_attn takes bfloat16 and float16, got {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"flash_attn takes head dimensions up to 256 that 8 divides, got {q.shape[-1]}"
    capability = torch.cuda.get_device_capability(q.device)
    if flash_module(capability) is None:
        return f"no flash_attn for compute capability {'.'.join(map(str, capability))} is installed"
    return None


@functools.cache
def flash_module(capability: tuple[int, int]) -> ModuleType | None:
    """The interface of flash-attn that is installed and made for this device."""
    for name, (oldest, newest) in FLASH_MODULES.items():
        if not oldest <= capability <= newest:
            continue
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        if hasattr(module, "flash_attn_func") and hasattr(module, "flash_attn_varlen_func"):
            return module
    return None


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _checked(lse: Tensor | None, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """L as float32 [B, H, N], contiguous."""
    batch, tokens, heads, _ = q.shape
    if lse is not None and lse.dim() == 4 and lse.shape[-1] == 1:
        lse = lse.squeeze(-1)
    if lse is None or lse.shape != (batch, heads, tokens) or lse.dtype != torch.float32:
        lse = log_sum_exp(q, k, scale).float()
    return lse.contiguous()
