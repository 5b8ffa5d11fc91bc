"""Tar shards in WebDataset's layout, read by offset and never unpacked."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import resource
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from vitds.data.class_names import ClassNumbers, read_class_names
from vitds.data.images import Unusable
from vitds.data.source import Label, Sample, Source
from vitds.data.storage import retried
from vitds.data.tar.first_use import indexed, shards_at
from vitds.data.tar.index import Head, index_path
from vitds.data.tar.members import BLOCK, Members
from vitds.data.tar.shard import Shard
from vitds.errors import UserError
from vitds.shards import shard_names

if TYPE_CHECKING:
    from vitds.data.section import SourceSection

OPEN_SHARDS = 192
DESCRIPTORS = 2
"""So many shards are kept open in each process, each by so many file descriptors."""
T = TypeVar("T")
GAP, PIECE = 64 << 10, 64 << 20
"""Images with fewer bytes than `GAP` between them are read in one piece, of at most `PIECE` bytes."""


class _Kept(NamedTuple):
    """What is kept of an index's head until all have been read."""

    digest: bytes
    images: int
    largest: int
    """Label; -1 where no label is a number."""
    multi_label: bool
    name: str | None
    """A class that a label names, if they do."""


class Tar(Source):
    """The images of all shards in the order of the shards' paths, and in each in the order of the tar.

    Of all shards together no more is held than a few numbers, the path and a digest each; the index of a shard is opened
    when one of its images is wanted.
    """

    keys: ClassVar[tuple[str, ...]] = ("path", "index_dir", "classes", "label_key")

    def __init__(self, section: SourceSection, role: str) -> None:
        place = f"vitds.data.{role}"
        if section.path is None:
            raise UserError(f"{place}.path: missing; source 'tar' needs a tar, a folder of them or a pattern")
        shards = shards_at(section.path, f"{place}.path")
        self._index_dir, self._label_key = section.index_dir, section.label_key
        stated: set[str] = set()

        def keep(head: Head) -> _Kept:
            stated.update(head.class_names)
            largest = -1 if head.largest is None else head.largest
            return _Kept(
                head.digest.encode(), head.count, largest, head.multi_label, next(iter(head.class_names), None)
            )

        kept = indexed(shards, section.index_dir, section.label_key, place, keep)
        # Arrays, for Python's own strings would be copied into every worker as their reference counts change.
        self._paths = np.array([os.fsencode(path) for path in shards])
        self._names = np.array([name.encode(errors="backslashreplace") for name in shard_names(shards)])
        self._digests = np.array([one.digest for one in kept])
        self._largest = np.array([one.largest for one in kept])
        self._ends = np.cumsum([one.images for one in kept], dtype=np.int64)
        if not self._ends[-1]:
            raise UserError(f"{place}.path: no image in {_some(shards)}; {_members_there(shards)}")
        self.multi_label = any(one.multi_label for one in kept)
        self._named = _labels_are_names(shards, kept, place)
        self.class_names = self._class_names(section, shards, sorted(stated), place)
        self._open_none_yet()

    def _class_names(
        self, section: SourceSection, shards: Sequence[str], stated: Sequence[str], place: str
    ) -> Sequence[str]:
        if section.classes is not None:
            names = read_class_names(section.classes, f"{place}.classes")
        else:
            beside = sorted({os.path.join(os.path.dirname(shard), "classes.json") for shard in shards})
            lists = {path: read_class_names(path, f"{place}.path") for path in beside if os.path.exists(path)}
            names = next(iter(lists.values()), [])
            other = next((path for path in lists if lists[path] != names), None)
            if other is not None:
                raise UserError(
                    f"{place}.path: {next(iter(lists))!r} and {other!r} number the classes differently; give one in {place}.classes"
                )
        if names and stated and not set(names) & set(stated):
            raise UserError(
                f"{place}.classes: none of the labels is in the list of classes; labels are {_some(stated)}, "
                f"the list has {_some(names)}"
            )
        return names or stated

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> Sample:
        return self.read_many([index])[0]

    def read_many(self, indices: Sequence[int]) -> list[Sample]:
        """These images in this order. Neighbours are read together.

        Raises:
            StorageError: a shard cannot be read, or is no longer what was indexed.
        """
        places = sorted((*self._place(index), at) for at, index in enumerate(indices))
        samples: dict[int, Sample] = {}
        for number, group in itertools.groupby(places, key=lambda place: place[0]):
            images = [(i, at) for _, i, at in group]
            samples |= self._of(number, functools.partial(self._samples, number, images))
        return [samples[at] for at in range(len(indices))]

    def _samples(self, number: int, images: Sequence[tuple[int, int]], shard: Shard) -> dict[int, Sample]:
        """Images of one shard, by what stands beside each."""
        samples: dict[int, Sample] = {}
        for piece in shard.pieces(images, GAP, PIECE):
            data = memoryview(shard.read(piece.start, piece.end - piece.start))
            for i, at in piece.images:
                begin = shard.index.offset[i] - piece.start
                shard.check(i, data[begin - BLOCK : begin])
                image = bytes(data[begin : begin + shard.index.size[i]])
                samples[at] = image, self._label(shard, i), self._key(number, shard, i)
        return samples

    def key(self, index: int) -> str:
        """The shard's name, a slash, and the key in it; of shards of one name as many folders in front as it takes."""
        number, i = self._place(index)
        return self._of(number, lambda shard: self._key(number, shard, i))

    def label(self, index: int) -> Label | Unusable:
        number, i = self._place(index)
        return self._of(number, lambda shard: self._label(shard, i))

    def find(self, keys: Iterable[str]) -> dict[str, int]:
        """As Source's; only the shards that the keys name are looked into."""
        number_of = {name.decode(): number for number, name in enumerate(self._names.tolist())}
        wanted: dict[int, dict[str, str]] = {}  # of each shard the keys in it, with the whole ones
        for key in keys:
            for cut in (i for i, character in enumerate(key) if character == "/"):
                if key[:cut] in number_of:
                    wanted.setdefault(number_of[key[:cut]], {})[key[cut + 1 :]] = key
        found: dict[str, int] = {}
        for number, whole in sorted(wanted.items()):
            start = self._start(number)
            of_shard = self._of(number, functools.partial(_find, whole))
            found |= {whole[key]: start + i for key, i in of_shard.items()}
        return found

    def digest(self) -> str:
        """Of what the indices say: keys, labels, sizes, places and times of all images, not the names of the shards."""
        names = list(self.class_names) if self._named else []
        found = hashlib.blake2b(repr((len(self), names)).encode(), digest_size=16)
        found.update(self._digests.tobytes())
        return found.hexdigest()

    def count_labels_from(self, bound: int) -> int:
        """Images with a label ≥ `bound`. Only shards that have such a label are looked into."""
        total = 0
        for number in np.flatnonzero(self._largest >= bound).tolist():
            total += self._of(number, lambda shard: shard.index.count_labels_from(bound))
        return total

    def _place(self, index: int) -> tuple[int, int]:
        """(shard, image in it)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - self._start(number)

    def _start(self, number: int) -> int:
        return int(self._ends[number - 1]) if number else 0

    def _key(self, number: int, shard: Shard, i: int) -> str:
        return f"{self._names[number].decode()}/{shard.index.key(i)}"

    def _label(self, shard: Shard, i: int) -> Label | Unusable:
        stored = shard.index.labels(i)
        if stored and stored[0] < 0:
            return Unusable(shard.index.head.reasons[-1 - stored[0]])
        if self._named:
            numbers = [shard.classes[one] for one in stored]
            unknown = next((one for one in numbers if isinstance(one, Unusable)), None)
            if unknown is not None:
                return Unusable(str(unknown))
            stored = [one for one in numbers if not isinstance(one, Unusable)]
        return stored if self.multi_label else stored[0]

    def _of(self, number: int, ask: Callable[[Shard], T]) -> T:
        """What shard `number`, opened if it is not, answers.

        Raises:
            StorageError: as `retried`, and as Shard.
        """

        def attempt() -> T:
            try:
                return ask(self._shard(number))
            except OSError:
                self._shard.cache_clear()  # a file server may have forgotten the descriptors
                raise

        return retried(attempt, os.fsdecode(self._paths[number]))

    def _open(self, number: int) -> Shard:
        path = os.fsdecode(self._paths[number])
        return Shard(
            path,
            index_path(path, self._index_dir, self._label_key),
            self._digests[number].decode(),
            self._numbers if self._named else None,
        )

    def _open_none_yet(self) -> None:
        self._shard = functools.lru_cache(OPEN_SHARDS)(self._open)
        _allow_open_files(DESCRIPTORS * min(OPEN_SHARDS, len(self._ends)))

    @functools.cached_property
    def _numbers(self) -> ClassNumbers:
        return ClassNumbers(self.class_names)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_shard"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._open_none_yet()


def _find(keys: Iterable[str], shard: Shard) -> dict[str, int]:
    """The numbers of those of `keys` that the shard holds."""
    return shard.index.find(keys)


def _labels_are_names(shards: Sequence[str], kept: Sequence[_Kept], place: str) -> bool:
    """Whether labels are names of classes and not their numbers."""
    named = next((i for i, one in enumerate(kept) if one.name is not None), None)
    numbered = next((i for i, one in enumerate(kept) if one.largest >= 0), None)
    if named is not None and numbered is not None:
        raise UserError(
            f"{place}.path: labels are numbers in {shards[numbered]} ({kept[numbered].largest}) and names in "
            f"{shards[named]} ({kept[named].name!r})"
        )
    return named is not None


def _allow_open_files(more: int) -> None:
    """Raises this process's own limit by so many, as far as it may: 1024, which is usual, is for the rest of it, of which
    the connections to other ranks may be the most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + more
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


def _members_there(shards: Sequence[str]) -> str:
    """What is in the first shard that holds anything, for someone who has put images there under other names."""
    for path in shards:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            names = [member.name.decode(errors="replace") for member in itertools.islice(Members(descriptor, path), 4)]
        finally:
            os.close(descriptor)
        if names:
            return (
                f"{path} holds {_some(names)}; expected KEY.jpg, .jpeg, .png, .webp or .bmp with no further dot in it"
            )
    return "they hold no files at all"


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "")
