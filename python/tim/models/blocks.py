"""The transformer block: attention, cross-attention and MLP behind adaptive norms.

Tokens, updates and conditions are tensors or, with tangents, `tim.ops.Pair`s of them.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tim import ops
from tim.models.config import TiMConfig
from tim.models.layers import LayerNorm, Linear, SwiGLU, grouped_swiglu
from tim.models.packing import Layout
from tim.ops import pairs
from tim.ops.pairs import Operand

#: Output of a sub-layer and its gate, not yet added to the tokens.
Update: TypeAlias = tuple[Operand, Operand] | None
#: Rotary cosines and sines.
Tables: TypeAlias = tuple[Tensor, Tensor]
#: Tokens [B, N, C]; in a packed batch the pieces of `Layout.pieces`.
Tokens: TypeAlias = Operand | list[Operand]


class Prepared(NamedTuple):
    """What a block makes of the conditions alone."""

    modulation: list[Operand]  #: shift, scale and gate [B, 1, C] of each sub-layer
    offset: Operand | None  #: [B, 1, 3 C], added to q, k and v of every token


def add_update(x: Tokens, update: Update, layout: Layout | None = None) -> Tokens:
    """Tokens [B, N, C] with the pending update added: x + gate y."""
    if update is None:
        return x
    if layout is not None:
        return [add_update(*piece) for piece in zip(x, _updates(update, layout), strict=True)]
    if not pairs.is_pair(x, *update):
        return x + update[1] * update[0]
    return pairs.lift(lambda x, y, gate: x + gate * y, x, *update)


def normalise(
    x: Tokens, update: Update, shift: Operand, scale: Operand, layout: Layout | None = None
) -> tuple[Tokens, Operand]:
    """Tokens with the pending update added, and their adaptive norm, in one pass.

    The norm of a packed batch is [sum of N_i, C].
    """
    if layout is not None:
        updates = [None] * len(x) if update is None else _updates(update, layout)
        modulation = (layout.rows_of_images(shift), layout.rows_of_images(scale))
        done = [normalise(*piece) for piece in zip(x, updates, *modulation, strict=True)]
        return [x for x, _ in done], layout.joined([h for _, h in done])
    if update is None:
        return x, ops.adaln(x, shift, scale)
    return ops.gated_adaln(x, *update, shift, scale)


def _updates(update: tuple[Operand, Operand], layout: Layout) -> list[tuple[Operand, Operand]]:
    """The update of a packed batch for each of the pieces of its tokens."""
    y, gate = update
    return list(zip(layout.pieces(y), layout.rows_of_images(gate), strict=True))


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

    def forward(
        self, x: Operand, offset: Operand | None, rope: Tables, layout: Layout | None = None
    ) -> Operand:
        """`offset` [B, 1, 3 C]: bias of q, k and v, and the projection of the interval."""
        bias = self.qkv.bias
        if offset is not None:
            bias = offset if layout is None else layout.spread(offset)
        qkv = ops.linear(x, self.qkv.weight, bias)
        qkv = pairs.each(lambda qkv: qkv.unflatten(-1, self.heads), qkv)
        if layout is None:
            return self.proj(_heads_joined(ops.attention(*self._rotated(qkv, rope))))
        outputs = []
        for part, piece in zip(layout.parts, layout.split_by_part(qkv), strict=True):
            tables = tuple(table[part.rows] for table in rope)
            offsets, longest = part.offsets(rope[0].device)
            out = ops.attention(
                *self._rotated(_as_one(piece), tables),
                cu_seqlens_q=offsets, cu_seqlens_k=offsets,
                max_seqlen_q=longest, max_seqlen_k=longest,
            )  # fmt: skip
            outputs.append(_heads_joined(out))
        return self.proj(layout.joined(outputs))

    def _rotated(self, qkv: Operand, rope: Tables) -> tuple[Operand, Operand, Operand]:
        if self.q_norm is None:
            q, k, v = pairs.unbind(qkv, 2)
            return _rotate(q, rope), _rotate(k, rope), v
        return ops.qk_norm_rope(
            qkv, self.q_norm.weight, self.q_norm.bias, self.k_norm.weight, self.k_norm.bias,
            *rope, self.q_norm.eps,
        )  # fmt: skip


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

    def forward(
        self, x: Operand, text: Operand, rope: Tables, layout: Layout | None = None
    ) -> Operand:
        q = pairs.each(lambda q: q.unflatten(-1, self.heads), self.q(x))
        kv = pairs.each(lambda kv: kv.unflatten(-1, (2, *self.heads)), self.kv(text))
        if layout is None:
            return self.proj(_heads_joined(ops.attention(*self._normed(q, kv, rope))))
        outputs = []
        pieces = layout.split_by_part(q), layout.split_by_part(kv, images=True)
        for part, q, kv in zip(layout.parts, *pieces, strict=True):
            tables = tuple(table[part.rows] for table in rope)
            captions = _as_one(pairs.each(lambda kv: kv.flatten(0, 1), kv))
            words = (kv.primal if pairs.is_pair(kv) else kv).shape[1]
            (offsets_q, longest_q), (offsets_k, longest_k) = (
                part.offsets(rope[0].device), part.offsets_of(words, rope[0].device),
            )  # fmt: skip
            out = ops.attention(
                *self._normed(_as_one(q), captions, tables),
                cu_seqlens_q=offsets_q, cu_seqlens_k=offsets_k,
                max_seqlen_q=longest_q, max_seqlen_k=longest_k,
            )  # fmt: skip
            outputs.append(_heads_joined(out))
        return self.proj(layout.joined(outputs))

    def _normed(self, q: Operand, kv: Operand, rope: Tables) -> tuple[Operand, Operand, Operand]:
        k, v = pairs.unbind(kv, 2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        dtype = (v.primal if pairs.is_pair(v) else v).dtype
        q, k = (pairs.each(lambda x: x.to(dtype), x) for x in (_rotate(q, rope), k))
        return q, k, v


def _head_norms(config: TiMConfig) -> tuple[LayerNorm | None, LayerNorm | None]:
    if not config.qk_norm:
        return None, None
    return LayerNorm(config.head_dim), LayerNorm(config.head_dim)


def _rotate(x: Operand, rope: Tables) -> Operand:
    return pairs.each(lambda x: ops.rotate_reference(x, *rope).to(x.dtype), x)


def _as_one(rows: Operand) -> Operand:
    """Rows of a packed batch as the one sample [1, rows, ...] that attention takes."""
    return pairs.each(lambda x: x[None], rows)


def _heads_joined(x: Operand) -> Operand:
    return pairs.each(lambda x: x.flatten(2), x)


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
        x: Tokens,
        update: Update,
        condition: Operand,
        interval: Operand,
        text: Operand | None,
        rope: Tables,
        prepared: Prepared | None = None,
        layout: Layout | None = None,
    ) -> tuple[Tokens, Update]:
        """Tokens and pending update before the block to tokens and pending update after it.

        Args:
            x: [B, N, C] tokens, and update: ([B, N, C], gate [B, 1, C]) or None.
            condition, interval: [B, 1, C], sum of all embeddings and the second time embedding.
            text: [B, M, C] normalised text tokens of a text model, else None.
            rope: cos, sin [N, head_dim].
            prepared: this block's of `prepare`, or None to have it made here.
            layout: of a packed batch, or None. N is then the tokens of all images, B their number;
                x are pieces, update ([N, C], gate [B, 1, C]).
        """
        if prepared is None:
            (prepared,) = prepare([self], condition, interval)
        modulation, offset = prepared
        shift, scale, gate = modulation[:3]
        x, h = normalise(x, update, shift, scale, layout)
        update = self.attn(h, offset, rope, layout), gate
        if self.cross_attn is not None:
            shift, scale, gate = modulation[3:6]
            x, h = normalise(x, update, shift, scale, layout)
            update = self.cross_attn(h, text, rope, layout), gate
        shift, scale, gate = modulation[-3:]
        x, h = normalise(x, update, shift, scale, layout)
        return x, (self.mlp(h), gate)


def prepare(blocks: Sequence[Block], condition: Operand, interval: Operand) -> list[Prepared]:
    """The conditions [B, 1, C] as each block uses them, for all blocks in a few products."""
    condition = pairs.each(lambda x: x[:, 0], condition)
    each_block = grouped_swiglu(condition, [block.adaLN_modulation for block in blocks])
    pieces = modulation_pieces(each_block, 3 * blocks[0].sublayers)
    offsets: list[Operand | None] = [None] * len(blocks)
    if blocks[0].attn.qkv_d is not None:
        offsets = pairs.unbind(
            ops.grouped_linear(
                pairs.each(lambda x: x[:, 0], interval),
                [block.attn.qkv_d.weight for block in blocks],
                [block.attn.qkv.bias for block in blocks],
            ),
            1,
        )
        offsets = [pairs.each(lambda x: x[:, None], offset) for offset in offsets]
    return [
        Prepared(modulation, offset) for modulation, offset in zip(pieces, offsets, strict=True)
    ]


def can_prepare(blocks: Iterable[Block]) -> bool:
    """Whether the weights for it are at hand: FSDP gathers those of a block only inside it."""
    weights = (
        weight
        for block in blocks
        for weight in (*block.adaLN_modulation.parameters(), block.attn.qkv.bias)
    )
    return all(type(weight) in (nn.Parameter, Tensor) for weight in weights)


def modulation_pieces(modulation: Operand, count: int) -> list[list[Operand]]:
    """For each group of [B, groups, count C] its `count` parts [B, 1, C], as views."""
    parts = pairs.each(lambda x: x.unflatten(2, (count, -1)).flatten(1, 2), modulation)
    pieces = [pairs.each(lambda x: x[:, None], piece) for piece in pairs.unbind(parts, 1)]
    return [pieces[i : i + count] for i in range(0, len(pieces), count)]


class FinalLayer(nn.Module):
    """Adaptive norm and the linear map of each token to its patch, channel fastest."""

    def __init__(self, hidden_size: int, out_features: int) -> None:
        super().__init__()
        self.linear = Linear(hidden_size, out_features)
        self.adaLN_modulation = SwiGLU(hidden_size, hidden_size // 2, 2 * hidden_size)

    def forward(
        self, x: Tokens, update: Update, condition: Operand, layout: Layout | None = None
    ) -> Operand:
        condition = pairs.each(lambda x: x[:, 0], condition)
        modulation = grouped_swiglu(condition, [self.adaLN_modulation])
        ((shift, scale),) = modulation_pieces(modulation, 2)
        return self.linear(normalise(x, update, shift, scale, layout)[1])


def norm_without_parameters(x: Operand) -> Operand:
    """Layer norm over the last dimension, as in front of every sub-layer, unmodulated."""
    return pairs.lift(lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-6), x)
