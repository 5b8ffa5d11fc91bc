"""Which axes of a parameter are factored, and how a contiguous piece of it splits into rectangles.

A parameter seen in its `view` becomes five axes (batch, x, middle, y, trailing) by merging neighbours: x and y are the
two factored ones in the order they lie in memory. A *slab* is one (middle, y, trailing) block. A fragment covers whole
slabs, in up to three rectangles (the rest of a batch entry, whole batch entries, the start of another), and at most two
parts of slabs at its ends. All work is therefore proportional to the fragment, not to the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vitds.layout import Fragment


@dataclass(frozen=True)
class Factoring:
    """The five merged axes, and the shapes of the two factors.

    "exp_avg_sq_row" is the view without its largest axis, "exp_avg_sq_col" without its second largest.
    """

    batch: int
    x: int
    middle: int
    y: int
    trailing: int
    row_shape: tuple[int, ...]
    col_shape: tuple[int, ...]
    row_is_over_y: bool
    """Whether the largest axis is y, so that row sums run over y."""

    @property
    def slab(self) -> int:
        """Elements of one slab."""
        return self.middle * self.y * self.trailing

    @property
    def num_over_y(self) -> int:
        """Elements of what is left when y is summed away: (batch, x, middle, trailing)."""
        return self.batch * self.x * self.middle * self.trailing

    @property
    def num_over_x(self) -> int:
        """Elements of what is left when x is summed away: (batch, middle, y, trailing)."""
        return self.batch * self.slab


def factoring_of(view: tuple[int, ...], min_size: int) -> Factoring | None:
    """How a view is factored: over its two largest axes, on ties the later one counts as larger.

    None when it has fewer than two axes or the second largest is below `min_size`: the second moment is kept whole.
    """
    if len(view) < 2:
        return None
    second, largest = sorted(range(len(view)), key=lambda axis: view[axis])[-2:]  # a stable sort
    if view[second] < min_size:
        return None
    x, y = sorted((second, largest))
    return Factoring(
        batch=math.prod(view[:x]),
        x=view[x],
        middle=math.prod(view[x + 1 : y]),
        y=view[y],
        trailing=math.prod(view[y + 1 :]),
        row_shape=view[:largest] + view[largest + 1 :],
        col_shape=view[:second] + view[second + 1 :],
        row_is_over_y=largest == y,
    )


@dataclass(frozen=True)
class Piece:
    """A rectangle of whole slabs, (num_batch, num_x, middle, y, trailing), or `numel` elements of a single slab.

    More than one batch entry is only taken whole (x = 0, all of num_x).
    """

    batch: int
    num_batch: int
    x: int
    num_x: int
    offset: int
    """First element, counted from the start of the fragment."""
    numel: int
    cut: int = 0
    """Elements of the slab that lie before the piece; the piece is a part of a slab if it has fewer than the slab."""


@dataclass(frozen=True)
class Factored:
    """A factored fragment of a flat: its axes, its pieces, and where its sums lie in "exp_avg_sq_factors"."""

    index: int
    fragment: Fragment
    axes: Factoring
    pieces: list[Piece]
    begin: int

    @property
    def middle(self) -> int:
        """Where the sums over y end and those over x begin."""
        return self.begin + self.axes.num_over_y

    @property
    def end(self) -> int:
        return self.middle + self.axes.num_over_x

    def over_y(self, factors: torch.Tensor) -> torch.Tensor:
        """(batch, x, middle, trailing)"""
        axes = self.axes
        return factors[self.begin : self.middle].view(axes.batch, axes.x, axes.middle, axes.trailing)

    def over_x(self, factors: torch.Tensor) -> torch.Tensor:
        """(batch, middle, y, trailing)"""
        axes = self.axes
        return factors[self.middle : self.end].view(axes.batch, axes.middle, axes.y, axes.trailing)


def pieces_of(axes: Factoring, start: int, numel: int, chunk: int) -> Iterator[Piece]:
    """Cuts elements [start, start + numel) of a parameter into pieces of about `chunk` elements, in order."""
    position, end = start, start + numel
    while position < end:
        slab, cut = divmod(position, axes.slab)
        batch, x = divmod(slab, axes.x)
        whole_slabs = (end - position) // axes.slab
        if cut or not whole_slabs:
            piece = Piece(batch, 1, x, 1, position - start, min(axes.slab - cut, end - position), cut)
        else:
            room = max(1, chunk // axes.slab)
            num_batch = min(whole_slabs, room) // axes.x if x == 0 else 0
            num_x = axes.x if num_batch else min(axes.x - x, whole_slabs, room)
            size = max(1, num_batch) * num_x * axes.slab
            piece = Piece(batch, max(1, num_batch), x, num_x, position - start, size)
        yield piece
        position += piece.numel


def as_slabs(axes: Factoring, piece: Piece, values: torch.Tensor, slab: torch.Tensor) -> torch.Tensor:
    """A fragment's values at a piece as (num_batch, num_x, middle, y, trailing).

    Whole slabs are viewed in place; a part of a slab is copied into `slab` (slab elements) and padded with zeros.
    """
    part = values[piece.offset : piece.offset + piece.numel]
    if piece.numel < axes.slab:
        slab.zero_()[piece.cut : piece.cut + piece.numel].copy_(part)
        part = slab
    return part.view(piece.num_batch, piece.num_x, axes.middle, axes.y, axes.trailing)
