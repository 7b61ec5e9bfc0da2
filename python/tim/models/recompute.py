"""Blocks recomputed in the backward pass instead of stored, with tangents riding along."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from tim.models.blocks import Block, Tokens, add_update
from tim.ops import pairs
from tim.ops.pairs import Operand, Pair


def values(operand: Operand) -> Tensor:
    return operand.primal if isinstance(operand, Pair) else operand


def values_in(tree: Any) -> Any:
    """The tree with values in place of pairs."""
    return tree_map(values, tree, is_leaf=lambda node: isinstance(node, Pair))


def recomputed(block: Block, tokens: Tokens, *conditions: Any) -> Tokens:
    """The block with its update added inside, so that one tensor per block is stored, not two.

    Tangents are computed the first time only: the backward pass does not need them.
    """
    layout, packed = conditions[-1], isinstance(tokens, list)
    pieces = tokens if packed else [tokens]
    tangents = []
    if pairs.is_pair(*pieces):
        tangents.append([piece.tangent if isinstance(piece, Pair) else None for piece in pieces])
    kept: list[Tensor | None] = []

    def run(inputs: list[Tensor], *conditions: Any) -> list[Tensor]:
        if not tangents:
            tokens = inputs if packed else inputs[0]
            out = add_update(*block(tokens, None, *values_in(conditions)), layout)
            return out if packed else [out]
        inputs = [
            value if tangent is None else Pair(value, tangent)
            for value, tangent in zip(inputs, tangents.pop(), strict=True)
        ]
        out = add_update(*block(inputs if packed else inputs[0], None, *conditions), layout)
        out = out if packed else [out]
        kept.extend(piece.tangent if isinstance(piece, Pair) else None for piece in out)
        return values_in(out)

    primals = checkpoint(
        run, values_in(pieces), *conditions, use_reentrant=False, preserve_rng_state=False
    )
    if kept:
        primals = [
            primal if tangent is None else Pair(primal, tangent)
            for primal, tangent in zip(primals, kept, strict=True)
        ]
        kept.clear()
    return primals if packed else primals[0]
