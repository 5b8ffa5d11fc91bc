"""The words in which formats speak: which numbers of one set of tensors make which of another.

A format knows names and shapes alone and touches no file, so the same description reads, writes and converts, a piece
at a time. Ours are timm's names (vitds.models.vit); everything else is "theirs".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch

from vitds.models.config import ViTConfig
from vitds.models.formats.outline import Outline

Shapes = Mapping[str, tuple[int, ...]]
"""Names and shapes of the tensors of a model, in whatever format."""
Change = Callable[[torch.Tensor], torch.Tensor]


def same(piece: torch.Tensor) -> torch.Tensor:
    """No change."""
    return piece


class Piece(NamedTuple):
    """A tensor of the source, or some of the rows of its first axis: one of them as `i`, which drops the axis (a layer of
    a stacked tensor), or [start, stop), which keeps it."""

    key: str
    rows: int | tuple[int, int] | None = None


class Part(NamedTuple):
    """The next elements, row-major, of a tensor of the target: made of pieces, which come as fp32."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    combine: Callable[[list[torch.Tensor]], torch.Tensor]


class Conversion(NamedTuple):
    """A tensor of the target: its parts follow one another along the first axis (q, k, v of a fused weight)."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def identical(self) -> str | None:
        """The source's tensor that is this one, unchanged and whole, or None."""
        if len(self.parts) == 1 and self.parts[0].combine is first and self.parts[0].pieces[0].rows is None:
            return self.parts[0].pieces[0].key
        return None


def first(pieces: list[torch.Tensor]) -> torch.Tensor:
    """The only piece, unchanged."""
    return pieces[0]


def one(shape: tuple[int, ...], piece: Piece, change: Change = same) -> Part:
    """A part made of one piece."""
    return Part(shape, (piece,), first if change is same else lambda pieces: change(pieces[0]))


class Format(Protocol):
    """A way in which weights travel. Every method is a function of names and shapes; UserErrors name no file, whoever
    opened it puts it before them."""

    name: str

    def recognise(self, shapes: Shapes) -> bool:
        """Whether the names are this format's; nothing is promised of their completeness."""

    def outline(self, shapes: Shapes) -> Outline:
        """What names and shapes tell of the model. UserError where they are not of one."""

    def told(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """The words of the config.json beside the weights as ViTConfig's; {} for one of somebody else's."""

    def incoming(self, shapes: Shapes) -> dict[str, Conversion]:
        """Our name -> how it is made of theirs. Strict: a tensor that nobody asks for is a UserError with the nearest
        name, one that is missing or of another shape too."""

    def outgoing(self, config: ViTConfig, **options: Any) -> dict[str, Conversion]:
        """Their name -> how it is made of ours, in the order of writing; init_head_bias is in the head's bias."""
