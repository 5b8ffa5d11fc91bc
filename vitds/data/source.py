"""What a loader may know of a place that images come from."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np

from vitds.data.images import Unusable

Label = int | list[int]
Sample = tuple[bytes | np.ndarray, Label | Unusable, str]
"""(image, label, key).

The image is an encoded file or a uint8 array (H, W) or (H, W, 3); the label a class, in a multi-label source a list of
classes, or why there is none; the key a name by which a person finds the image, of its own in the source.
"""


class Source(ABC):
    """Images by index, in the order in which they are stored. Read by several processes at once, forked or unpickled.

    A source of your own sets `class_names` (and `multi_label`) and defines `__len__` and `read`; the rest follows, and
    is worth defining where it can be done faster.
    """

    keys: ClassVar[tuple[str, ...]] = ()
    """Keys of the section, beside `source`, `transforms` and `exclude`, that this source reads; others are refused."""
    multi_label: bool = False
    """Whether labels are lists of classes."""
    class_names: Sequence[str] = ()
    """By class; empty where labels are bare numbers of which no list is known."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> Sample:
        """Image `index`.

        Raises:
            StorageError: the storage failed, several times over.
        """

    def read_many(self, indices: Sequence[int]) -> list[Sample]:
        """These images in this order; a source that reads neighbours faster together does it here."""
        return [self.read(index) for index in indices]

    def key(self, index: int) -> str:
        """The key of image `index`."""
        return self.read(index)[2]

    def label(self, index: int) -> Label | Unusable:
        """The label of image `index`."""
        return self.read(index)[1]

    def all_labels(self) -> np.ndarray:
        """The class of every image, int64 (N,), −1 where there is none; of a source with one label an image."""
        found = (self.label(index) for index in range(len(self)))
        return np.fromiter((label if isinstance(label, int) else -1 for label in found), np.int64, len(self))

    def count_labels_from(self, bound: int) -> int:
        """How many images have a label ≥ `bound`; 0 where it would take reading them all to know."""
        return 0

    def find(self, keys: Iterable[str]) -> dict[str, int]:
        """The indices of those of `keys` that there are."""
        wanted = set(keys)
        found = ((self.key(index), index) for index in range(len(self)))
        return {key: index for key, index in found if key in wanted}

    def digest(self) -> str:
        """Hexadecimal; other images, or the same in another order, have another. A stand-in for their bytes that does
        not take reading them all, the same on all hosts that hold the same files."""
        return hashlib.blake2b(repr((len(self), list(self.class_names))).encode(), digest_size=16).hexdigest()


def classes_of(label: Label) -> list[int]:
    """The classes that a label names, whether it is one or a list of them."""
    return label if isinstance(label, list) else [label]
