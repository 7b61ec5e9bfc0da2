"""The transformer block: attention, cross-attention and MLP behind adaptive norms."""

from typing import TypeAlias

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tim import ops
from tim.models.config import TiMConfig
from tim.models.layers import LayerNorm, Linear, SwiGLU

#: Output of a sub-layer and its gate, not yet added to the tokens.
Update: TypeAlias = tuple[Tensor, Tensor] | None
#: Rotary cosines and sines.
Tables: TypeAlias = tuple[Tensor, Tensor]


def add_update(x: Tensor, update: Update) -> Tensor:
    """Tokens [B, N, C] with the pending update added: x + gate y."""
    return x if update is None else x + update[1] * update[0]


def normalise(x: Tensor, update: Update, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens with the pending update added, and their adaptive norm, in one pass."""
    if update is None:
        return x, ops.adaln(x, shift, scale)
    return ops.gated_adaln(x, *update, shift, scale)


class Attention(nn.Module):
    """Self-attention with normalised, rotated queries and keys.

    With `distance_aware` a projection of the interval embedding is added to q, k and v of every
    token (interval-aware attention, TiM arXiv 2509.04394, sec. 3).
    """

    def __init__(self, config: TiMConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = (3, config.num_heads, config.head_dim)
        self.qkv = Linear(width, 3 * width)
        self.qkv_d = Linear(width, 3 * width, bias=False) if config.distance_aware else None
        self.q_norm, self.k_norm = _head_norms(config)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, interval: Tensor, rope: Tables) -> Tensor:
        qkv = self.qkv(x)
        if self.qkv_d is not None:
            qkv = qkv + self.qkv_d(interval)
        qkv = qkv.unflatten(-1, self.heads)
        if self.q_norm is None:
            q, k, v = qkv.unbind(2)
            q, k = _rotate(q, rope), _rotate(k, rope)
        else:
            q, k, v = ops.qk_norm_rope(
                qkv, self.q_norm.weight, self.q_norm.bias, self.k_norm.weight, self.k_norm.bias,
                *rope, self.q_norm.eps,
            )  # fmt: skip
        return self.proj(ops.attention(q, k, v).flatten(2))


class CrossAttention(nn.Module):
    """Attention of image tokens to text tokens; only the queries are rotated."""

    def __init__(self, config: TiMConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = (config.num_heads, config.head_dim)
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.q_norm, self.k_norm = _head_norms(config)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, rope: Tables) -> Tensor:
        q = self.q(x).unflatten(-1, self.heads)
        k, v = self.kv(text).unflatten(-1, (2, *self.heads)).unbind(2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.proj(ops.attention(_rotate(q, rope).to(v.dtype), k.to(v.dtype), v).flatten(2))


def _head_norms(config: TiMConfig) -> tuple[LayerNorm | None, LayerNorm | None]:
    if not config.qk_norm:
        return None, None
    return LayerNorm(config.head_dim), LayerNorm(config.head_dim)


def _rotate(x: Tensor, rope: Tables) -> Tensor:
    return ops.rotate_reference(x, *rope).to(x.dtype)


class Block(nn.Module):
    """Self-attention, cross-attention (text models) and MLP, each gated and adaptively normalised.

    Every sub-layer reads norm(x) (1 + scale) + shift and leaves x + gate y. The last addition is
    left to whoever norms the tokens next, so that both are one pass over them.
    """

    def __init__(self, config: TiMConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attn = Attention(config)
        self.cross_attn = CrossAttention(config) if config.num_classes is None else None
        self.mlp = SwiGLU(width, 4 * width * 2 // 3, width)
        self.sublayers = 2 if self.cross_attn is None else 3
        inner = config.lora_hidden_size or width // 4 * 3
        self.adaLN_modulation = SwiGLU(width, inner, 3 * self.sublayers * width)

    def forward(
        self,
        x: Tensor,
        update: Update,
        condition: Tensor,
        interval: Tensor,
        text: Tensor | None,
        rope: Tables,
    ) -> tuple[Tensor, Update]:
        """Tokens and pending update before the block to tokens and pending update after it.

        Args:
            x: [B, N, C] tokens, and update: ([B, N, C], gate [B, 1, C]) or None.
            condition, interval: [B, 1, C], sum of all embeddings and the second time embedding.
            text: [B, M, C] normalised text tokens of a text model, else None.
            rope: cos, sin [N, head_dim].
        """
        modulation = self.adaLN_modulation(condition).chunk(3 * self.sublayers, dim=-1)
        shift, scale, gate = modulation[:3]
        x, h = normalise(x, update, shift, scale)
        update = self.attn(h, interval, rope), gate
        if self.cross_attn is not None:
            shift, scale, gate = modulation[3:6]
            x, h = normalise(x, update, shift, scale)
            update = self.cross_attn(h, text, rope), gate
        shift, scale, gate = modulation[-3:]
        x, h = normalise(x, update, shift, scale)
        return x, (self.mlp(h), gate)


class FinalLayer(nn.Module):
    """Adaptive norm and the linear map of each token to its patch, channel fastest."""

    def __init__(self, hidden_size: int, out_features: int) -> None:
        super().__init__()
        self.linear = Linear(hidden_size, out_features)
        self.adaLN_modulation = SwiGLU(hidden_size, hidden_size // 2, 2 * hidden_size)

    def forward(self, x: Tensor, update: Update, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(normalise(x, update, shift, scale)[1])


def norm_without_parameters(x: Tensor) -> Tensor:
    """Layer norm over the last dimension, as in front of every sub-layer, unmodulated."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)
