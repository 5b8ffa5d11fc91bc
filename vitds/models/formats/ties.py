"""Tables of which piece of theirs is which piece of ours, and both directions of a format from one table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from vitds.errors import UserError, nearest
from vitds.models.formats.words import Change, Conversion, Part, Piece, Shapes, one, same


class Tie(NamedTuple):
    """The same numbers, there and here. Listed so that the pieces of each tensor come in the order of its rows."""

    theirs: Piece
    ours: Piece
    their_shape: tuple[int, ...]
    """Of the piece."""
    our_shape: tuple[int, ...]
    """Of the piece."""
    to_ours: Change = same
    to_theirs: Change = same


def incoming(ties: Iterable[Tie], ours: Shapes) -> dict[str, Conversion]:
    """Our tensors, of shapes `ours`, made of theirs."""
    parts: dict[str, list[Part]] = {name: [] for name in ours}
    for tie in ties:
        parts[tie.ours.key].append(one(tie.our_shape, tie.theirs, tie.to_ours))
    return {name: Conversion(ours[name], tuple(pieces)) for name, pieces in parts.items()}


def outgoing(ties: Iterable[Tie], theirs: Shapes) -> dict[str, Conversion]:
    """Their tensors, of shapes `theirs`, made of ours."""
    parts: dict[str, list[Part]] = {name: [] for name in theirs}
    for tie in ties:
        parts[tie.theirs.key].append(one(tie.their_shape, tie.ours, tie.to_theirs))
    return {name: Conversion(theirs[name], tuple(pieces)) for name, pieces in parts.items()}


def their_shapes(ties: Iterable[Tie]) -> dict[str, tuple[int, ...]]:
    """The shape of each of their tensors that a table promises, in its order."""
    rows: dict[str, tuple[int, ...]] = {}
    for tie in ties:
        key, taken = tie.theirs
        shape = tie.their_shape if not isinstance(taken, int) else (1, *tie.their_shape)
        rows[key] = shape if key not in rows else (rows[key][0] + shape[0], *rows[key][1:])
    return rows


def check(expected: Shapes, found: Shapes) -> None:
    """What a format wants is what is there, and no more.

    Raises:
        UserError: the first tensor that is missing, of another shape, or that nobody asks for.
    """
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"no tensor {name!r} there{nearest(name, set(found) - set(expected))}")
        if tuple(found[name]) != tuple(shape):
            raise UserError(f"tensor {name!r} has shape {tuple(found[name])} there, {tuple(shape)} was expected")
    left = [name for name in found if name not in expected]
    if left:
        more = f", and {len(left) - 1} more like it" if len(left) > 1 else ""
        raise UserError(f"tensor {left[0]!r}{more}: nothing here asks for it{nearest(left[0], expected)}")


def numbered(shapes: Mapping[str, tuple[int, ...]], prefix: str, suffix: str) -> int:
    """How many blocks there are: one more than the highest i of `<prefix>i<suffix>`.

    Raises:
        UserError: one before the last is missing.
    """
    found = {
        int(middle)
        for name in shapes
        if name.startswith(prefix) and name.endswith(suffix)
        if (middle := name[len(prefix) : len(name) - len(suffix)]).isdecimal() and len(middle) < 6
    }
    depth = max(found, default=-1) + 1
    missing = next((i for i in range(depth) if i not in found), None)
    if missing is not None:
        raise UserError(f"no tensor '{prefix}{missing}{suffix}' there, although there are blocks up to {depth - 1}")
    return depth
