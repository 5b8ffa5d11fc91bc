"""Training images that are held out of training: a minival, by which a rate or a length can be chosen (appendix D of the paper)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

import numpy as np

from vitds.data.exclusion import Excluding
from vitds.data.images import Unusable
from vitds.data.permutation import all_permuted
from vitds.data.source import Label, Sample, Source, classes_of
from vitds.errors import UserError


class Part(Source):
    """The images of `source` at `included` and no others, in the order in which they are stored.

    Args:
        source: of which these are images.
        included: their indices, int64 (K,).
    """

    def __init__(self, source: Source, included: np.ndarray) -> None:
        self.source = source
        self.multi_label, self.class_names = source.multi_label, source.class_names
        self.included = np.unique(np.asarray(included, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.included)

    def read(self, index: int) -> Sample:
        return self.source.read(int(self.included[index]))

    def read_many(self, indices: Sequence[int]) -> list[Sample]:
        return self.source.read_many(self.included[np.asarray(indices, dtype=np.int64)].tolist())

    def key(self, index: int) -> str:
        return self.source.key(int(self.included[index]))

    def label(self, index: int) -> Label | Unusable:
        return self.source.label(int(self.included[index]))

    def all_labels(self) -> np.ndarray:
        return self.source.all_labels()[self.included]

    def find(self, keys: Iterable[str]) -> dict[str, int]:
        found = self.source.find(keys)
        ours = {int(index): place for place, index in enumerate(self.included)}
        return {key: ours[index] for key, index in found.items() if index in ours}

    def count_labels_from(self, bound: int) -> int:
        if not self.source.count_labels_from(bound):
            return 0
        labels = (self.source.label(index) for index in self.included.tolist())
        return sum(not isinstance(label, Unusable) and max(classes_of(label), default=-1) >= bound for label in labels)

    def digest(self) -> str:
        """Of the source's own and of which images these are."""
        found = hashlib.blake2b(self.source.digest().encode(), digest_size=16, person=b"part")
        found.update(self.included.astype("<i8").tobytes())
        return found.hexdigest()


def check_minival(amount: float) -> None:
    """Refuses what is neither a share of the images nor a number of them.

    Raises:
        UserError: below 0, or a number of images that is not whole.
    """
    if not 0 <= amount < math.inf or (amount >= 1 and amount != int(amount)):
        raise UserError(
            f"vitds.data.minival: expected a share of the training images below 1, as in 0.02, or a whole number of them, found {amount}"
        )


def hold_out(source: Source, amount: float) -> tuple[Source, Source | None]:
    """What is left to train on, and the minival (None where `amount` is 0).

    Which images those are depends on how many images there are and on nothing else: neither on the run's seed, so that
    runs of several seeds or rates are compared on the same images, nor on the amount, so that a smaller minival is part of
    a larger one.

    Args:
        source: the training images.
        amount: below 1 a share of them, rounded to at least one image; from 1 on a number of them.

    Raises:
        UserError: nothing is left to train on.
    """
    if amount == 0:
        return source, None
    number = int(amount) if amount >= 1 else max(1, round(amount * len(source)))
    if number >= len(source):
        raise UserError(f"vitds.data.minival: {amount:g} holds out all {len(source)} training images")
    held = all_permuted("minival", np.arange(number, dtype=np.int64), len(source))
    return Excluding(source, held), Part(source, held)
