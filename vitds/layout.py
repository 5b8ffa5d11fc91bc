"""The words in which zero/, optim/ and checkpoint/ speak of what one rank holds.

DeepSpeed hands an optimizer flat buffers ("flats") in which parameters lie cut and concatenated. A `Flat` says which
piece of which parameter lies where; a `Shard` is one rank's part of one logical tensor, as a writable view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of one parameter, at [offset, offset + numel) of a flat.

    Indices count elements of the parameter flattened in row-major order. `numel` may be 0: every rank lists every
    parameter of a flat, so that collectives over a flat are the same on all ranks.
    """

    name: str
    shape: tuple[int, ...]
    """Logical shape of the whole parameter."""
    view: tuple[int, ...]
    """Shape in which a factored optimizer sees the parameter (same elements in the same order; per-head axes apart)."""
    start: int
    numel: int
    offset: int

    def __post_init__(self) -> None:
        assert math.prod(self.view) == math.prod(self.shape), f"{self.name}: view {self.view} of shape {self.shape}"
        assert 0 <= self.start <= self.start + self.numel <= math.prod(self.shape), self

    @property
    def total(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """This fragment's elements in a tensor laid out like the flat, as a 1-D view (numel,)."""
        return flat.view(-1)[self.offset : self.offset + self.numel]


@dataclass(frozen=True)
class Flat:
    """One tensor that the optimizer steps, and the fragments that lie in it."""

    tensor: torch.Tensor
    fragments: tuple[Fragment, ...]
    group: Any = None
    """Process group over which the parameters of this flat are cut; None: this rank holds them whole."""

    def __post_init__(self) -> None:
        assert self.tensor.is_contiguous(), "a flat is contiguous memory"
        for fragment in self.fragments:
            assert fragment.offset + fragment.numel <= self.tensor.numel(), fragment


@dataclass(frozen=True)
class Shard:
    """One rank's part of one logical tensor: elements [start, start + len(data)) of `name`, flattened.

    `data` is a 1-D view of the live storage: copying into it changes the state. A `replicated` tensor is whole on
    every rank, and only one rank needs to write it.
    """

    name: str
    shape: tuple[int, ...]
    data: torch.Tensor
    start: int = 0
    group: Any = None
    replicated: bool = False

    @property
    def total(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)


def whole(name: str, tensor: torch.Tensor, view: tuple[int, ...] | None = None) -> Flat:
    """The flat of a parameter that no wrapper has cut: one fragment, all of it."""
    shape = tuple(tensor.shape)
    return Flat(tensor, (Fragment(name, shape, view or shape, 0, tensor.numel(), 0),))
