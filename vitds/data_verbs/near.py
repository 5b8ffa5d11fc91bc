"""All pairs of hashes that differ in few bits, without comparing all pairs.

Multi-index hashing (Norouzi, Punjani and Fleet, 2012): two 64-bit words that differ in at most d bits differ in at
most d // 4 bits in one of their four 16-bit parts. A table for each part lists the words known, under every value so
near to their own.
"""

from __future__ import annotations

import itertools

import numpy as np

PARTS, PART_BITS = 4, 16
PAIRS_AT_ONCE = 1 << 22
"""Candidates compared together; bounds the memory."""


class Near:
    """Finds, among `words`, those that differ from a given one in at most `distance` bits: all of them, and no other.

    Args:
        words: uint64 (M,).
        distance: most bits, 0 to 15.
    """

    def __init__(self, words: np.ndarray, distance: int) -> None:
        assert 0 <= distance < 4 * PARTS, distance
        self.words, self.distance = words, distance
        flips = [
            sum(1 << bit for bit in bits)
            for n in range(distance // PARTS + 1)
            for bits in itertools.combinations(range(PART_BITS), n)
        ]
        self._tables = [_table(_part(words, part), np.array(flips, dtype=np.uint16)) for part in range(PARTS)]

    def pairs(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pairs (query, word) that are near, as indices, int64 (P,) each, in ascending order.

        Args:
            queries: uint64 (Q,).
        """
        found = [np.empty(0, dtype=np.int64)]
        for part, (starts, members) in enumerate(self._tables):
            values = _part(queries, part)
            counts = starts[values.astype(np.int64) + 1] - starts[values]
            ends = np.cumsum(counts)
            first = 0
            while first < len(queries):
                before = ends[first - 1] if first else 0
                last = max(first + 1, int(np.searchsorted(ends, before + PAIRS_AT_ONCE, side="right")))
                some = slice(first, last)
                query = np.repeat(np.arange(first, last), counts[some])
                within = np.arange(len(query)) - np.repeat(ends[some] - counts[some] - before, counts[some])
                word = members[np.repeat(starts[values[some]], counts[some]) + within]
                near = np.bitwise_count(queries[query] ^ self.words[word]) <= self.distance
                found.append(query[near] * len(self.words) + word[near])
                first = last
        both = np.unique(np.concatenate(found))
        return both // max(1, len(self.words)), both % max(1, len(self.words))


def _part(words: np.ndarray, part: int) -> np.ndarray:
    return ((words >> np.uint64(PART_BITS * part)) & np.uint64((1 << PART_BITS) - 1)).astype(np.uint16)


def _table(values: np.ndarray, flips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(starts, members): the words listed under value v are members[starts[v] : starts[v + 1]]."""
    near = (values[:, None] ^ flips).ravel()
    order = np.argsort(near, kind="stable")
    starts = np.zeros((1 << PART_BITS) + 1, dtype=np.int64)
    np.cumsum(np.bincount(near, minlength=1 << PART_BITS), out=starts[1:])
    return starts, (order // len(flips)).astype(np.int32)
