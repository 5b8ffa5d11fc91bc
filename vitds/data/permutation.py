"""Random permutations of any size that are computed, not stored: one place of 3 billion takes a microsecond and no memory.

An alternating Feistel network on the smallest power of two that holds the size, walked along its cycle until the value
is again a valid one (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). The domain is less than twice
the size, so a walk takes fewer than two rounds of the network on average.
"""

from __future__ import annotations

import functools
import hashlib
from typing import TypeVar

import numpy as np

Word = TypeVar("Word", int, np.ndarray)
ROUNDS = 8
WORD_MASK = (1 << 64) - 1


def permuted(name: str, value: int, size: int) -> int:
    """What the permutation of [0, size) that is called `name` puts in the place of `value`."""
    keys, bits = _round_keys(name), (size - 1).bit_length()
    value = _permute(value, keys, bits)
    while value >= size:
        value = _permute(value, keys, bits)
    return value


def all_permuted(name: str, values: np.ndarray, size: int) -> np.ndarray:
    """`permuted` of each of `values`, int64 (P,), as int64 (P,)."""
    keys, bits = _round_keys(name), (size - 1).bit_length()
    found = _permute(values.astype(np.uint64), keys, bits)
    while (outside := np.flatnonzero(found >= size)).size:
        found[outside] = _permute(found[outside], keys, bits)
    return found.astype(np.int64)


@functools.lru_cache(maxsize=64)
def _round_keys(name: str) -> tuple[int, ...]:
    digest = hashlib.blake2b(name.encode(), digest_size=8 * ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS))


def _permute(value: Word, keys: tuple[int, ...], bits: int) -> Word:
    """A bijection of [0, 2**bits): one half of the bits is masked with a keyed hash of the other, in turn."""
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    low, high = value & low_mask, value >> low_bits
    for i in range(0, ROUNDS, 2):
        high = high ^ (_hash(low, keys[i]) & high_mask)
        low = low ^ (_hash(high, keys[i + 1]) & low_mask)
    return (high << low_bits) | low


def _hash(word: Word, key: int) -> Word:
    """64 well-mixed bits of (word, key): two multiply-and-xorshift steps with the constants of SplitMix64."""
    word = word ^ key
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD_MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD_MASK
    return word ^ (word >> 31)
