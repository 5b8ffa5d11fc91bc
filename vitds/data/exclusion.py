"""A source without some of its images."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence

import numpy as np

from vitds.data.images import Unusable
from vitds.data.source import Label, Sample, Source, classes_of
from vitds.errors import UserError, nearest


class Excluding(Source):
    """The images of `source` but those at `excluded`, in the order in which they are stored.

    Args:
        source: of which images are left out.
        excluded: their indices, int64 (E,).
    """

    def __init__(self, source: Source, excluded: np.ndarray) -> None:
        self.source = source
        self.multi_label, self.class_names = source.multi_label, source.class_names
        self.excluded = np.unique(np.asarray(excluded, dtype=np.int64))
        self._kept_before = self.excluded - np.arange(len(self.excluded))
        """Of each excluded image, how many in front of it are kept."""

    def __len__(self) -> int:
        return len(self.source) - len(self.excluded)

    def stored(self, indices: Sequence[int]) -> np.ndarray:
        """Where these images lie in the whole source, int64, in O(log E) each."""
        wanted = np.asarray(indices, dtype=np.int64)
        return wanted + np.searchsorted(self._kept_before, wanted, side="right")

    def read(self, index: int) -> Sample:
        return self.source.read(int(self.stored([index])[0]))

    def read_many(self, indices: Sequence[int]) -> list[Sample]:
        return self.source.read_many(self.stored(indices).tolist())

    def key(self, index: int) -> str:
        return self.source.key(int(self.stored([index])[0]))

    def label(self, index: int) -> Label | Unusable:
        return self.source.label(int(self.stored([index])[0]))

    def all_labels(self) -> np.ndarray:
        return np.delete(self.source.all_labels(), self.excluded)

    def find(self, keys: Iterable[str]) -> dict[str, int]:
        found = self.source.find(keys)
        at = np.fromiter(found.values(), dtype=np.int64, count=len(found))
        kept = ~np.isin(at, self.excluded)
        ours = at - np.searchsorted(self.excluded, at)
        return {key: int(index) for key, index, keep in zip(found, ours, kept, strict=True) if keep}

    def count_labels_from(self, bound: int) -> int:
        found = self.source.count_labels_from(bound)
        if found:  # Seldom, and then those that are left out do not count: their labels may be why.
            labels = (self.source.label(index) for index in self.excluded.tolist())
            found -= sum(
                not isinstance(label, Unusable) and max(classes_of(label), default=-1) >= bound for label in labels
            )
        return found

    def digest(self) -> str:
        """Of the source's own and of what is left out of it."""
        found = hashlib.blake2b(self.source.digest().encode(), digest_size=16)
        found.update(self.excluded.astype("<i8").tobytes())
        return found.hexdigest()


def leave_out(source: Source, path: str, place: str) -> Source:
    """`source` without the images that the file at `path` names.

    Args:
        path: one key a line, or JSON lines with a "key" each, as `vitds data dedup` writes them.
        place: where the user has named the file, for messages.

    Raises:
        UserError: the file cannot be read, names images that the source does not hold, or all that it holds.
    """
    keys = read_keys(os.path.expanduser(path), place)
    found = source.find(keys)
    missing = [key for key in keys if key not in found]
    if missing:
        # Said, not passed over: after the images were packed anew the list would leave out nothing at all.
        raise UserError(
            f"{place}: {path!r} names {len(missing)} of {len(keys)} images that are not among the {len(source)} of the "
            f"source, the first {missing[0]!r}; keys there look like {source.key(0)!r}. Was the list made from other files?"
        )
    if len(found) == len(source):
        raise UserError(f"{place}: {path!r} leaves out all {len(source)} images")
    return Excluding(source, np.fromiter(found.values(), dtype=np.int64, count=len(found)))


def read_keys(path: str, place: str) -> list[str]:
    """The keys that a list of images names, each once.

    Raises:
        UserError: the file cannot be read, or a line of it that begins with a brace is no JSON object with a "key".
    """
    keys: dict[str, None] = {}
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:  # as Python reads names of files
            for number, line in enumerate(file, 1):
                if line.startswith("{"):
                    keys[_key_of(line, f"{place}: {path}: line {number}")] = None
                elif name := line.rstrip("\r\n"):
                    keys[name] = None
    except FileNotFoundError:
        folder, name = os.path.split(path)
        siblings = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
        raise UserError(f"{place}: {path!r}: no such file{nearest(name, siblings)}") from None
    except OSError as error:
        raise UserError(f"{place}: {path!r} cannot be read: {error.strerror}") from None
    return list(keys)


def _key_of(line: str, place: str) -> str:
    try:
        key = json.loads(line).get("key")
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: {error.msg}; expected a key, or JSON with a key") from None
    if not isinstance(key, str):
        raise UserError(f'{place}: expected {{"key": "…"}}, found {line.strip()[:80]}')
    return key
