"""Values and their tangents side by side, as a network carries them from layer to layer.

PyTorch's dual numbers hold a tangent for each value. In training only part of a batch has a time
derivative, and a `Pair` holds tangents of that part alone: one pass serves the whole batch. The
public operations take a Pair wherever they take a tensor that may carry a tangent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from tim.ops import _dispatch as dispatch
from tim.ops._dispatch import refuse_tangents

__all__ = [
    "Operand", "Pair", "add", "as_dual", "count", "each", "is_pair", "join", "lift", "of_duals",
    "promote", "refuse_tangents", "split", "split_promoted", "subtract", "unbind",
]  # fmt: skip


class Pair(NamedTuple):
    """Values of a batch and tangents of its last samples; the tangents keep no autograd graph."""

    primal: Tensor  #: [B, ...]
    tangent: Tensor  #: [T, ...] of the last T <= B samples


#: What a layer of a network is given: values alone, or with tangents.
Operand: TypeAlias = Tensor | Pair


def of_duals(tensors: Sequence[Tensor], parameters: Iterable[Tensor]) -> tuple[Operand, ...] | None:
    """The tensors with their forward-mode tangents; those of the first are there even if zero.

    None where there are no tangents; or where they have to stay dual numbers: under torch.func.vmap
    and grad, and when `parameters` have tangents of their own.
    """
    if forward_ad._current_level < 0 or dispatch.has_transform(
        TransformType.Vmap, TransformType.Grad
    ):
        return None
    primals, tangents = dispatch.split_tangents(*tensors)
    if tangents is None or dispatch.split_tangents(*parameters)[1] is not None:
        return None
    first = torch.zeros_like(primals[0]) if tangents[0] is None else tangents[0]
    return tuple(
        primal if tangent is None else Pair(primal, tangent)
        for primal, tangent in zip(primals, (first, *tangents[1:]), strict=True)
    )


def as_dual(what: str, operand: Operand) -> Tensor:
    """A dual number of a Pair, whose backward pass raises when it meets tangents."""
    if not isinstance(operand, Pair):
        return operand
    return forward_ad.make_dual(dispatch.guard_backward(what, operand.primal), operand.tangent)


def is_pair(*operands: object) -> bool:
    for operand in operands:  # noqa: SIM110  a generator costs more than all of these
        if isinstance(operand, Pair):
            return True
    return False


def split(*operands: Operand) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Primals and tangents of the operands; None for the tangents of plain tensors.

    Raises ValueError when tangents differ in their number of samples.
    """
    primals, tangents, samples = [], [], None
    for operand in operands:
        if not isinstance(operand, Pair):
            primals.append(operand)
            tangents.append(None)
            continue
        primal, tangent = operand
        primals.append(primal)
        tangents.append(tangent)
        shape, whole = tangent.shape, primal.shape
        if shape != whole and (shape[1:] != whole[1:] or shape[0] > whole[0]):
            raise ValueError(
                f"tangents must be those of the last samples of {list(whole)}, "
                f"got shape {list(shape)}"
            )
        if samples is not None and shape[0] != samples:
            counts = sorted({len(t) for t in tangents if t is not None})
            raise ValueError(f"tangents must be of the same samples, got {counts} of them")
        samples = shape[0]
    return tuple(primals), tuple(tangents)


def promote(*operands: Operand) -> tuple[Operand, ...]:
    """Operands in the common dtype of their primals."""
    return join(*split_promoted(*operands))


def split_promoted(
    *operands: Operand,
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """As `split`, in the common dtype of the primals."""
    primals, tangents = split(*operands)
    promoted = dispatch.promote(*primals)
    dtype = promoted[0].dtype
    for tangent in tangents:
        if tangent is not None and tangent.dtype != dtype:
            return promoted, tuple(None if t is None else t.to(dtype) for t in tangents)
    return promoted, tangents


def join(primals: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> tuple[Operand, ...]:
    """The operands of which `split` made these."""
    return tuple(
        primal if tangent is None else Pair(primal, tangent)
        for primal, tangent in zip(primals, tangents, strict=True)
    )


def count(tangents: Sequence[Tensor | None]) -> int:
    """Samples that have tangents."""
    for tangent in tangents:
        if tangent is not None:
            return tangent.shape[0]
    raise ValueError("tangents must hold at least one tensor, got none")


def each(function: Callable[[Tensor], Tensor], operand: Operand) -> Operand:
    """`function`, which is linear and takes each sample alone, of values and of tangents."""
    if not isinstance(operand, Pair):
        return function(operand)
    with torch.no_grad():
        tangent = function(operand.tangent)
    return Pair(function(operand.primal), tangent)


def unbind(operand: Operand, dim: int) -> list[Operand]:
    """Tensor.unbind of values and of tangents, along another dimension than that of samples."""
    if not isinstance(operand, Pair):
        return list(operand.unbind(dim))
    return [
        Pair(primal, tangent)
        for primal, tangent in zip(
            operand.primal.unbind(dim), operand.tangent.unbind(dim), strict=True
        )
    ]


def add(a: Operand, b: Operand) -> Operand:
    """a + b, of one shape."""
    if not is_pair(a, b):
        return a + b
    (p, q), (t_p, t_q) = split(a, b)
    with torch.no_grad():
        tangent = (t_q if t_p is None else t_p) if t_p is None or t_q is None else t_p + t_q
    return Pair(p + q, tangent)


def subtract(a: Operand, b: Operand) -> Operand:
    """a - b, of one shape."""
    if not is_pair(a, b):
        return a - b
    if isinstance(b, Pair):
        return add(a, each(torch.neg, b))
    return Pair(a.primal - b, a.tangent)


def lift(function: Callable[..., Tensor | tuple[Tensor, ...]], *operands: Operand):
    """A function of PyTorch's operations, of pairs: its tangents by forward mode.

    `function` takes each sample alone. For references, and what no operation of ours covers. It is
    evaluated twice where there are pairs: the values keep their graph, the tangents have none.
    """
    if not is_pair(*operands):
        return function(*operands)
    primals, tangents = split(*operands)
    size = count(tangents)
    outputs = function(*primals)
    derivatives = _derivatives(function, primals, tangents, size)
    if isinstance(outputs, Tensor):
        return Pair(outputs, derivatives[0])
    return tuple(Pair(*pair) for pair in zip(outputs, derivatives, strict=True))


def _derivatives(
    function: Callable, primals: Sequence[Tensor], tangents: Sequence[Tensor | None], size: int
) -> tuple[Tensor, ...]:
    tails = [primal[len(primal) - size :].detach() for primal in primals]
    if torch.compiler.is_compiling():
        # Dynamo has no dual numbers of views whose offset is symbolic.
        tails = [tail.clone() for tail in tails]
    if forward_ad._current_level >= 0:
        # Inside torch.func.jvp or a level of dual numbers: one more cannot be entered everywhere.
        with torch.no_grad():
            duals = [
                x if t is None else forward_ad.make_dual(x, t)
                for x, t in zip(tails, tangents, strict=True)
            ]
            outputs = function(*duals)
            found = [forward_ad.unpack_dual(out) for out in _as_tuple(outputs)]
            return tuple(_tangent(dual) for dual in found)
    moving = [i for i, tangent in enumerate(tangents) if tangent is not None]

    def of_moving(*values: Tensor) -> tuple[Tensor, ...]:
        arguments = list(tails)
        for i, value in zip(moving, values, strict=True):
            arguments[i] = value
        return _as_tuple(function(*arguments))

    with torch.no_grad():
        primal = tuple(tails[i] for i in moving)
        return torch.func.jvp(of_moving, primal, tuple(tangents[i] for i in moving))[1]


def _tangent(dual: tuple[Tensor, Tensor | None]) -> Tensor:
    primal, tangent = dual
    return torch.zeros_like(primal) if tangent is None else tangent


def _as_tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)
