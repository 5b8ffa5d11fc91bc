"""Handwritten digits that ship inside scikit-learn: 1797 grey images of 8×8 pixels, from 13 people.

Test set of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from vitds.data.source import Sample, Source
from vitds.errors import UserError, one_of

if TYPE_CHECKING:
    from vitds.data.section import SourceSection

HELD_OUT_PER_CLASS = 36


def held_out(labels: np.ndarray) -> np.ndarray:
    """Mask (N,) of the fixed evaluation split: 36 images of each class, evenly spaced among those of the class.

    Evenly spaced, so that it covers all writers; every fifth image would follow the order in which the digits were
    written and hold 48 threes but 26 twos. For the 1797 digits: 360 held out, 1437 to train on.
    """
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        mask[members[np.arange(HELD_OUT_PER_CLASS) * len(members) // HELD_OUT_PER_CLASS]] = True
    return mask


class Digits(Source):
    """The digits of one split; the values 0…16 are stretched to 0…255."""

    keys: ClassVar[tuple[str, ...]] = ("split",)
    class_names = [str(digit) for digit in range(10)]  # noqa: RUF012

    def __init__(self, section: SourceSection, role: str) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UserError(
                f"vitds.data.{role}.source: 'digits' ships inside scikit-learn, which cannot be imported ({error}); "
                "pip install scikit-learn"
            ) from error
        split = section.split or role
        if split not in ("train", "eval"):
            raise UserError(one_of(f"vitds.data.{role}.split", split, ("train", "eval")))
        digits = load_digits()
        labels = digits.target.astype(np.int64)
        mine = held_out(labels) == (split == "eval")
        self.images = np.round(digits.images[mine] * (255 / 16)).astype(np.uint8)  # (N, 8, 8)
        self.labels = labels[mine].tolist()
        self.numbers = np.flatnonzero(mine)

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, index: int) -> str:
        return f"digits/{self.numbers[index]}"

    def read(self, index: int) -> Sample:
        return self.images[index], self.labels[index], self.key(index)
