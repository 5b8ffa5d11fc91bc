"""Random streams that are pure functions of what they are for."""

from __future__ import annotations

import functools
import hashlib

import numpy as np


def augmentation_rng(seed: int, position: int) -> np.random.Generator:
    """The generator for the augmentation of the image at `position`: the same on any rank, worker and resume."""
    return np.random.Generator(np.random.Philox(_Key("augmentation", seed, position)))  # type: ignore[arg-type]


def mixup_rng(seed: int, step: int) -> np.random.Generator:
    """The generator for the mixing weight of one global batch."""
    return np.random.Generator(np.random.Philox(_Key("mixup", seed, step)))  # type: ignore[arg-type]


class _Key(np.random.bit_generator.ISeedSequence):
    """Hands Philox its 128-bit key as it is: (hash of purpose and seed, count).

    Philox(key=…) means the same but first gathers entropy from the system, at three times the cost per image.
    """

    def __init__(self, purpose: str, seed: int, count: int) -> None:
        self.words = (_seed_word(purpose, seed), count)

    def generate_state(self, n_words: int, dtype: object = np.uint32) -> np.ndarray:
        assert (n_words, dtype) == (2, np.uint64), (n_words, dtype)
        return np.array(self.words, dtype=np.uint64)


@functools.lru_cache(maxsize=64)
def _seed_word(purpose: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{purpose}/{seed}".encode(), digest_size=8).digest(), "little")
