"""Images of different sizes as one sequence of tokens, without padding.

Tokens of all images lie behind one another, [sum of N_i, C], in every layer that takes each token
alone. Attention keeps the images apart by their first rows (cu_seqlens). Adaptive norms have one
modulation per image: they run on the images of one length together, [n, N, C], with the kernels of
ordinary batches, and the residual stream stays in these pieces through all blocks. So a packed
batch costs one copy of each norm's output, and no modulation is ever written out token by token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tim.models.tables import cached
from tim.ops import pairs
from tim.ops.pairs import Operand, Pair


@dataclass(frozen=True)
class Run:
    """Images of one length that lie behind one another."""

    images: slice
    rows: slice  #: their tokens
    length: int  #: tokens of one image


@dataclass(frozen=True)
class Part:
    """Images that attention takes in one call: those without tangents, or those with."""

    images: slice
    rows: slice
    lengths: tuple[int, ...]

    def offsets(self, device: torch.device) -> tuple[Tensor, int]:
        """cu_seqlens [S + 1] of the images' tokens, and the longest."""
        rows = tuple(itertools.accumulate(self.lengths, initial=0))
        return cached(_vector, rows, device), max(self.lengths)

    def offsets_of(self, length: int, device: torch.device) -> tuple[Tensor, int]:
        """The same where each image has `length` rows, of captions say."""
        rows = tuple(range(0, (len(self.lengths) + 1) * length, length))
        return cached(_vector, rows, device), length


@dataclass(frozen=True)
class Layout:
    """Where the images of a packed batch lie; the last `moving` of them have tangents.

    Images are sorted by length, those with tangents behind the others: `order` says which image of
    the caller lies where.
    """

    grids: tuple[tuple[int, int], ...]  #: (rows, columns) of tokens of the caller's images
    moving: int

    @cached_property
    def order(self) -> tuple[int, ...]:
        resting = len(self.grids) - self.moving
        lengths = [rows * columns for rows, columns in self.grids]
        return tuple(sorted(range(len(lengths)), key=lambda i: (i >= resting, lengths[i], i)))

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of the images, in order."""
        return tuple(self.grids[i][0] * self.grids[i][1] for i in self.order)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        runs, image, row = [], 0, 0
        for length, group in itertools.groupby(self.lengths):
            count = sum(1 for _ in group)
            rows = slice(row, row + count * length)
            runs.append(Run(slice(image, image + count), rows, length))
            image, row = image + count, rows.stop
        return tuple(runs)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        resting = len(self.grids) - self.moving
        middle, end = sum(self.lengths[:resting]), sum(self.lengths)
        parts = (
            Part(slice(0, resting), slice(0, middle), self.lengths[:resting]),
            Part(slice(resting, None), slice(middle, end), self.lengths[resting:]),
        )
        return tuple(part for part in parts if part.lengths)

    def ordered(self, per_image: Operand) -> Operand:
        """A value for each of the caller's images, in the order of this layout."""
        if self.order == tuple(range(len(self.order))):
            return per_image
        if not isinstance(per_image, Pair):
            return per_image[cached(_vector, self.order, per_image.device)]
        resting = len(self.grids) - self.moving
        last = tuple(i - resting for i in self.order[resting:])
        tangent = per_image.tangent[cached(_vector, last, per_image.tangent.device)]
        return Pair(self.ordered(per_image.primal), tangent)

    def concatenated(self, per_image: Sequence[Tensor]) -> Tensor:
        """Rows [N_i, ...] of the caller's images, behind one another in the order of this layout.

        Fewer than there are images: of the last ones.
        """
        first = len(self.grids) - len(per_image)
        return torch.cat([per_image[i - first] for i in self.order if i >= first])

    def images(self, rows: Tensor) -> list[Tensor]:
        """The rows of each of the caller's images; those of the last ones if there are fewer."""
        first = 0 if len(rows) == sum(self.lengths) else len(self.grids) - self.moving
        found = dict(zip(self.order[first:], rows.split(self.lengths[first:]), strict=True))
        return [found[i] for i in sorted(found)]

    def pieces(self, tokens: Operand) -> list[Operand]:
        """Tokens [sum of N_i, ...] as one [n, N, ...] for each run."""
        sizes = [run.rows.stop - run.rows.start for run in self.runs]
        pieces = self._split(tokens, sizes)
        return [
            pairs.each(lambda x, run=run: x.unflatten(0, (-1, run.length)), piece)
            for run, piece in zip(self.runs, pieces, strict=True)
        ]

    def rows_of_images(self, per_image: Operand) -> list[Operand]:
        """Values [S, ...] of the images as one [n, ...] for each run."""
        return self._split(per_image, [run.images.stop - run.images.start for run in self.runs])

    def joined(self, pieces: Sequence[Operand]) -> Operand:
        """Inverse of `pieces`."""
        if len(pieces) == 1:
            return pairs.each(lambda x: x.flatten(0, 1), pieces[0])
        values = [piece.primal if isinstance(piece, Pair) else piece for piece in pieces]
        out = torch.cat([value.flatten(0, 1) for value in values])
        if not pairs.is_pair(*pieces):
            return out
        with torch.no_grad():
            tangents = [piece.tangent.flatten(0, 1) for piece in pieces if isinstance(piece, Pair)]
            return Pair(out, torch.cat(tangents))

    def spread(self, per_image: Operand) -> Operand:
        """Values [S, 1, C] of the images, written out for each of their tokens: [sum of N_i, C]."""

        def written_out(values: Tensor) -> Tensor:
            lengths = self.lengths[len(self.lengths) - len(values) :]
            # Its derivative adds up the rows of each image, with nothing scattered.
            return torch.cat(
                [x.expand(n, -1) for x, n in zip(values.unbind(), lengths, strict=True)]
            )

        return pairs.each(written_out, per_image)

    def split_by_part(self, operand: Operand, images: bool = False) -> list[Operand]:
        """Tokens (or values of the images) without and with tangents, each with those of all."""
        which = [part.images if images else part.rows for part in self.parts]
        sizes = [len(range(*s.indices(_count(operand)))) for s in which]
        if not isinstance(operand, Pair):
            return list(operand.split(sizes))
        *resting, last = operand.primal.split(sizes)
        return [*resting, Pair(last, operand.tangent)]

    def _split(self, operand: Operand, sizes: Sequence[int]) -> list[Operand]:
        if not isinstance(operand, Pair):
            return list(operand.split(sizes))
        primals = operand.primal.split(sizes)
        # The first samples have no tangents: those of a piece are of its last samples.
        left, moving = len(operand.primal) - len(operand.tangent), []
        for size in sizes:
            moving.append(size - min(size, left))
            left -= min(size, left)
        tangents = operand.tangent.split(moving)
        return [
            Pair(primal, tangent) if len(tangent) else primal
            for primal, tangent in zip(primals, tangents, strict=True)
        ]


def _count(operand: Operand) -> int:
    return len(operand.primal if isinstance(operand, Pair) else operand)


def _vector(values: tuple[int, ...], device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.tensor(values, device=device, dtype=torch.int32)
    # A copy from pageable memory waits for all that the device has still to do.
    return torch.tensor(values, dtype=torch.int32, pin_memory=True).to(device, non_blocking=True)
