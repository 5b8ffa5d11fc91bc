"""Which image stands at which position of the training stream: a pure function with no stored permutation.

Position p lies in epoch p // num_images, and every epoch is its own permutation of the images, keyed by (seed, epoch).
The permutation is an alternating Feistel network on the smallest power of two that holds num_images, walked along its
cycle until the value is again a valid index (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
The domain is less than twice num_images, so a walk takes fewer than two rounds of the network on average.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

if TYPE_CHECKING:
    from vitds.data.section import OrderSection

Word = TypeVar("Word", int, np.ndarray)
ROUNDS = 8
WORD_MASK = (1 << 64) - 1


class Order(Protocol):
    """Which image stands at which position; a value, handed to worker processes."""

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Indices in [0, num_images), int64 (P,), of the images at `positions` ≥ 0, (P,)."""


@dataclass(frozen=True)
class FullOrder:
    """A random permutation of all images, another one each epoch."""

    seed: int
    num_images: int

    def indices(self, positions: np.ndarray) -> np.ndarray:
        return orders(self.seed, positions, self.num_images)


def build_order(section: OrderSection, seed: int, num_images: int) -> Order:
    """The order that the run file asks for, over `num_images` ≥ 1."""
    assert num_images > 0, num_images
    if section.kind == "windowed":
        raise NotImplementedError
    return FullOrder(seed, num_images)


def order(seed: int, position: int, num_images: int) -> int:
    """Index in [0, num_images) of the image at `position` ≥ 0 of the stream; O(1) time and memory.

    Over the positions of one epoch, [e·num_images, (e+1)·num_images), every index occurs exactly once.
    """
    assert min(num_images - 1, position) >= 0, (num_images, position)
    epoch, index = divmod(position, num_images)
    keys, bits = _round_keys(seed, epoch), (num_images - 1).bit_length()
    index = _permute(index, keys, bits)
    while index >= num_images:
        index = _permute(index, keys, bits)
    return index


def orders(seed: int, positions: np.ndarray, num_images: int) -> np.ndarray:
    """`order` for an array of positions (P,), as int64 (P,)."""
    assert num_images > 0, num_images
    positions = np.asarray(positions, dtype=np.int64)
    bits = (num_images - 1).bit_length()
    epochs = positions // num_images
    indices = (positions - epochs * num_images).astype(np.uint64)
    for epoch in np.unique(epochs):
        keys = _round_keys(seed, int(epoch))
        here = np.flatnonzero(epochs == epoch)
        while here.size:
            indices[here] = _permute(indices[here], keys, bits)
            here = here[indices[here] >= num_images]
    return indices.astype(np.int64)


@functools.lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"order/{seed}/{epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS))


def _permute(index: Word, keys: tuple[int, ...], bits: int) -> Word:
    """A bijection of [0, 2**bits): one half of the bits is masked with a keyed hash of the other, in turn."""
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    low, high = index & low_mask, index >> low_bits
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
