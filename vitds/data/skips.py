"""Ranges [start, end) of positions that a run has given up, whole global batches each; its stream hops over them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def merged(ranges: Iterable[Sequence[int]]) -> list[tuple[int, int]]:
    """The same positions as disjoint ranges [start, end) in ascending order, none touching the next."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(map(tuple, ranges)):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def hop(position: int, skipped: Iterable[Sequence[int]]) -> int:
    """The first position ≥ `position` that lies in none of the ranges."""
    for start, end in merged(skipped):
        if start <= position < end:
            return end
    return position


def batch_start(number: int, position: int, global_batch: int, skipped: Iterable[Sequence[int]]) -> int:
    """Start of the global batch that comes `number` ≥ 0 batches after the first at or behind `position`."""
    position = hop(position, skipped)
    start = position + number * global_batch
    for first, end in merged(skipped):
        if position < first <= start:
            start += end - first
    return start


def reach_back(position: int, batches: int, global_batch: int, skipped: Iterable[Sequence[int]]) -> int:
    """Where the last `batches` ≥ 1 global batches began, that at `position` included; at most back to the beginning."""
    ranges = merged(skipped)
    for _ in range(batches - 1):
        before = position - global_batch
        for start, end in reversed(ranges):
            if start <= before < end:
                before = start - global_batch
        if before < 0:
            break
        position = before
    return position
