"""Parameter groups by patterns on names: first match wins, every parameter in exactly one group."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitds.errors import UserError, nearest
from vitds.sections import key, parse

FLAT_ELEMENTS = 2**26
"""Elements that a rank steps at a time at most: of a larger flat the fp32 gradient alone, made whole and dropped in every step, would take
4 bytes an element, here 256 MiB; a smaller one costs launches and collectives (G/14 on one rank has 32 flats, on 64 ranks one a group)."""


@dataclass(frozen=True)
class Group:
    """Parameters with the same settings. The group's learning rate is lr · lr_mult · schedule(step)."""

    name: str
    names: tuple[str, ...]
    lr: float
    lr_mult: float
    weight_decay: float
    """Scaled by the group's learning rate, torch's convention: so lr_mult scales the decay too."""
    frozen: bool
    numel: int


@dataclass(frozen=True)
class _Settings:
    """What one entry of `vitds.groups` may set."""

    weight_decay: float | None = key(None, "Decoupled weight decay, ≥ 0; default: that of the model's pattern.")
    lr_mult: float = key(1.0, "Multiplies the learning rate, > 0.")
    frozen: bool = key(False, "Not trained: no gradient, no optimizer state, not in the clipped norm.")


def build_groups(
    shapes: Mapping[str, Sequence[int]],
    *,
    lr: float,
    weight_decay: float,
    head_weight_decay: float | None,
    decay_patterns: Sequence[tuple[str, str]],
    overrides: Sequence[Any] = (),
) -> list[Group]:
    """Sorts parameters into groups: the user's patterns in their order, then the model's.

    A user's pattern that sets no weight decay leaves each parameter the decay it has by the model's patterns, and makes
    one group for each such decay. A model's pattern that matches nothing makes no group.

    Args:
        shapes: parameter name -> shape, in the model's order.
        lr: base learning rate.
        weight_decay: decay of the group "kernels".
        head_weight_decay: decay of the group "head"; None: the same.
        decay_patterns: the model's (group, regex), ordered; "head", "kernels" and "rest" (no decay).
        overrides: `vitds.groups` of the run file, [[regex, {weight_decay, lr_mult, frozen}], …].

    Returns:
        Non-empty groups that partition the parameters, user's first; frozen ones are included and marked.

    Raises:
        UserError: a bad pattern or setting, a user's pattern that matches nothing new, everything frozen.
    """
    head_decay = weight_decay if head_weight_decay is None else head_weight_decay
    decays = {"head": head_decay, "kernels": weight_decay, "rest": 0.0}
    assert all(group in decays for group, _ in decay_patterns), decay_patterns
    users = [_parse_override(i, entry) for i, entry in enumerate(overrides)]
    members: dict[tuple[str, float], list[str]] = {}
    settings: dict[str, _Settings] = {}
    used: set[int] = set()
    for name in shapes:
        default = next((group for group, pattern in decay_patterns if re.fullmatch(pattern, name)), None)
        assert default is not None, f"no decay pattern of the model covers {name}"
        mine = next((i for i, (pattern, _) in enumerate(users) if pattern.fullmatch(name)), None)
        if mine is None:
            members.setdefault((default, decays[default]), []).append(name)
            continue
        used.add(mine)
        pattern, setting = users[mine]
        if setting.frozen or setting.weight_decay is not None:
            label, decay = pattern.pattern, setting.weight_decay or 0.0
        else:
            label, decay = f"{pattern.pattern} ({default})", decays[default]
        settings[label] = setting
        members.setdefault((label, decay), []).append(name)
    for i, (pattern, _) in enumerate(users):
        if i not in used:
            some = any(pattern.fullmatch(name) for name in shapes)
            why = "every parameter it matches is taken by an earlier pattern" if some else "matches no parameter"
            hint = "" if some else nearest(pattern.pattern, shapes)
            raise UserError(
                f"vitds.groups[{i}]: the pattern {pattern.pattern!r} {why}{hint}; a pattern covers whole names"
            )
    order = [*settings, *(group for group, _ in decay_patterns)]
    groups = []
    for (label, decay), names in sorted(members.items(), key=lambda item: order.index(item[0][0])):
        setting = settings.get(label, _Settings())
        numel = sum(math.prod(shapes[name]) for name in names)
        groups.append(Group(label, tuple(names), lr, setting.lr_mult, decay, setting.frozen, numel))
    assert sorted(name for group in groups for name in group.names) == sorted(shapes), "not a partition"
    assert len({group.name for group in groups}) == len(groups), "two groups of one name"
    if all(group.frozen for group in groups):
        raise UserError("vitds.groups: every parameter is frozen; nothing is left to train")
    return groups


def flats_of(
    names: Sequence[str], sizes: Mapping[str, int], ranks: int, limit: int = FLAT_ELEMENTS
) -> tuple[tuple[str, ...], ...]:
    """Cuts a group's parameters, in their order, into what is stepped as one flat at ZeRO stages 1 and 2.

    Args:
        names: of one group.
        sizes: elements of every parameter.
        ranks: over how many a flat is cut evenly.
        limit: elements of a flat on one rank. No parameter is cut for it; one that is larger is alone.
    """
    flats = list[list[str]]()
    filled = 0
    for name in names:
        if not flats or filled + sizes[name] > limit * ranks:
            flats.append([])
            filled = 0
        flats[-1].append(name)
        filled += sizes[name]
    return tuple(map(tuple, flats))


def describe(groups: Sequence[Group]) -> str:
    """A table: group, tensors, parameters, learning rate, weight decay."""
    rows = [("group", "tensors", "parameters", "lr", "weight decay")]
    for g in groups:
        rates = ("frozen", "") if g.frozen else (f"{g.lr * g.lr_mult:g}", f"{g.weight_decay:g}")
        rows.append((g.name, str(len(g.names)), f"{g.numel:,}", *rates))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    table = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *cells[1:]]) for row, cells in zip(rows, table, strict=True))


def _parse_override(index: int, entry: Any) -> tuple[re.Pattern[str], _Settings]:
    place = f"vitds.groups[{index}]"
    if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not isinstance(entry[0], str):
        raise UserError(f"{place}: expected [pattern, {{weight_decay, lr_mult, frozen}}], found {entry!r}")
    try:
        pattern = re.compile(entry[0])
    except re.error as error:
        raise UserError(f"{place}: {entry[0]!r} is not a regular expression: {error}") from error
    setting = parse(_Settings, entry[1], place)
    if setting.weight_decay is not None and not 0 <= setting.weight_decay < math.inf:
        raise UserError(f"{place}.weight_decay: {setting.weight_decay!r} is not a number ≥ 0")
    if not 0 < setting.lr_mult < math.inf:
        raise UserError(f"{place}.lr_mult: {setting.lr_mult!r} is not a number > 0; to stop training it, set frozen")
    return pattern, setting
