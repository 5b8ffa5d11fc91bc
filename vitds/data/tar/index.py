"""The index of one shard: where its images lie and what their labels are, as a safetensors file.

Tensors, over the shard's n images in their order in the tar:

    offset    int64 (n,)    of the image's bytes in the tar; its header is the 512 bytes before
    size      int64 (n,)    of the image in bytes
    crc       uint32 (n,)   crc32 of that header
    label     int32 (n,)    a class; of a multi-label shard the classes of all images one after another
    label_end uint32 (n,)   multi-label only: where an image's classes end, its first stand behind the last of the one before
    name      uint8         the keys of all images, UTF-8 where the tar's are, one after another
    name_end  uint32 (n,)   where an image's key ends

A label of −1 − k says that the image cannot be used because of `reasons[k]`; in a shard of class names, k ≥ 0 is
`class_names[k]`. The file's metadata holds under `index` a JSON object, the fields of `Head`. docs/data.md says the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
from safetensors.numpy import save

from vitds.data.images import Unusable
from vitds.data.storage import retried
from vitds.data.tar.columns import Column, OpenFile
from vitds.data.tar.labels import Labelled, Stated, labelled
from vitds.data.tar.members import Members, read_at
from vitds.errors import UserError

FORMAT = 1
SUFFIX = ".index.safetensors"
_DTYPES: dict[str, type[np.generic]] = {"I64": np.int64, "I32": np.int32, "U32": np.uint32, "U8": np.uint8}
_LARGEST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Head:
    """What an index says of its shard as a whole."""

    format: int
    tar_bytes: int
    tar_mtime_ns: int
    """Size and time of the tar that was indexed: if it has others now, the index is of no use."""
    label_key: str | None
    count: int
    unusable: int
    """Images without a label that can be used."""
    multi_label: bool
    class_names: list[str]
    """Sorted, those that labels name; empty where labels are integers."""
    smallest: int | None
    largest: int | None
    """Of the integer labels; none if there are none."""
    reasons: list[str]
    digest: str
    """Of all tensors, class names and reasons: the same for a copy of the tar, at whatever time it was made."""


@dataclass(frozen=True)
class Index:
    """An index that is open: only what is looked at is read. All of it raises OSError where that fails."""

    head: Head
    offset: Column
    size: Column
    crc: Column
    label: Column
    name: Column
    name_end: Column
    label_end: Column | None = None

    def key(self, i: int) -> str:
        """The key of the shard's image i."""
        return self.name.part(*_bounds(self.name_end, i)).tobytes().decode(errors="backslashreplace")

    def find(self, keys: Iterable[str]) -> dict[str, int]:
        """Those of `keys` that images have, each with the first of them. Names are not taken apart for it: an index may
        hold many, and 100,000 indices be asked for a few keys each."""
        names, ends = self.name.whole.tobytes(), self.name_end.whole
        found = {key: i for key in keys if (i := _find(key.encode(errors="surrogatepass"), names, ends)) is not None}
        odd = {key for key in keys if "\\x" in key and key not in found}  # as `key` shows what is no UTF-8
        for i in range(len(self.offset) if odd else 0):
            if (key := self.key(i)) in odd:
                found.setdefault(key, i)
        return found

    def labels(self, i: int) -> list[int]:
        """As they are stored."""
        if self.label_end is None:
            return [self.label[i]]
        return self.label.part(*_bounds(self.label_end, i)).tolist()  # type: ignore[no-any-return]

    def count_labels_from(self, bound: int) -> int:
        """Images with a label ≥ `bound`."""
        wrong = np.flatnonzero(self.label.whole >= bound)
        if self.label_end is not None:
            wrong = np.unique(np.searchsorted(self.label_end.whole, wrong, side="right"))
        return len(wrong)


def _bounds(ends: Column, i: int) -> tuple[int, int]:
    """Where the part of image i begins and ends, of parts that lie one after another."""
    if i == 0:
        return 0, ends[0]
    start, end = ends.part(i - 1, i + 1).tolist()
    return start, end


def _find(name: bytes, names: bytes, ends: np.ndarray) -> int | None:
    """Which of the names that end at `ends` this is, if any."""
    at = names.find(name) if name else -1
    while at >= 0:
        i = int(np.searchsorted(ends, at, side="right"))
        if at + len(name) == ends[i] and at == (ends[i - 1] if i else 0):
            return i
        at = names.find(name, at + 1)
    return None


def index_path(shard: str, index_dir: str | None = None, label_key: str | None = None) -> str:
    """Where the index of a shard is: beside it, or in a folder, there with a mark of the folder that the shard is in, so
    that shards of one name do not meet. Indices made with a label key of one's own do not meet the others."""
    folder, name = os.path.split(os.path.abspath(shard))
    own = f".{quote(label_key, safe='')}" if label_key is not None else ""
    if index_dir is None:
        return os.path.join(folder, name + own + SUFFIX)
    mark = hashlib.blake2b(os.fsencode(folder), digest_size=6).hexdigest()
    return os.path.join(os.path.abspath(os.path.expanduser(index_dir)), f"{name}.{mark}{own}{SUFFIX}")


def build_index(shard: str, label_key: str | None = None) -> bytes:
    """The index of a shard as the bytes of its file: the same whoever builds it.

    Raises:
        UserError: the tar cannot be used (vitds.data.tar.members), changes meanwhile, or has both numbers and names of
            classes for labels.
        StorageError: it cannot be read.
    """
    descriptor = retried(lambda: os.open(shard, os.O_RDONLY | os.O_CLOEXEC), shard)
    try:
        before = os.fstat(descriptor)
        images = list(labelled(Members(descriptor, shard), label_key))
        after = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError(f"{shard}: it is still being written: it has changed while it was read")
    return _encode(shard, images, before, label_key)


def write_index(shard: str, path: str, label_key: str | None = None) -> Head:
    """Build the index of a shard and write it to `path`, so that at any time there is a whole one there or none.

    Raises:
        UserError, StorageError: as `build_index`.
        OSError: it cannot be written there.
    """
    data = build_index(shard, label_key)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = (
        f"{path}.{secrets.token_hex(8)}.tmp"  # containers may have one host name, and each a process of this number
    )
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    return _parse(data[8 : 8 + int.from_bytes(data[:8], "little")])[0]


def read_head(path: str) -> Head | None:
    """What the index there says of its shard; None where there is none, or none of this format that is whole.

    Raises:
        StorageError: it cannot be read.
    """

    def read() -> Head | None:
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                bytes_there = os.fstat(file.fileno()).st_size
                head, tensors = _parse(file.read(length) if length < bytes_there else b"")
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            return None
        ends = [tensor["data_offsets"][1] for tensor in tensors.values()]
        return head if head.format == FORMAT and 8 + length + max(ends) == bytes_there else None

    return retried(read, path)


def open_index(path: str) -> Index:
    """The index there.

    Raises:
        OSError: it cannot be read.
        ValueError, KeyError, TypeError: it is none.
    """
    file = OpenFile(path)
    start = 8 + int.from_bytes(read_at(file.descriptor, 0, 8), "little")
    bytes_there = os.fstat(file.descriptor).st_size
    head, tensors = _parse(read_at(file.descriptor, 8, start - 8) if start <= bytes_there else b"")
    if start + max(tensor["data_offsets"][1] for tensor in tensors.values()) != bytes_there:
        raise ValueError(f"{path}: not whole")
    columns = {
        name: Column(file, start + tensor["data_offsets"][0], _DTYPES[tensor["dtype"]], tensor["shape"][0])
        for name, tensor in tensors.items()
    }
    return Index(head, **columns)


def _parse(header: bytes) -> tuple[Head, dict[str, Any]]:
    tensors = json.loads(header.decode())
    return Head(**json.loads(tensors.pop("__metadata__")["index"])), tensors


def _encode(shard: str, images: Sequence[Labelled], tar: os.stat_result, label_key: str | None) -> bytes:
    reasons: dict[str, int] = {}
    class_names = _class_names(shard, images)
    number = {name: i for i, name in enumerate(class_names)}
    encoded = [_numbers(image.label, number, reasons) for image in images]
    flat = np.array([one for labels in encoded for one in labels], np.int32)
    integers = flat[flat >= 0] if not class_names else flat[:0]
    multi_label = any(isinstance(image.label, list) for image in images)
    tensors: dict[str, np.ndarray] = {
        "offset": np.array([image.image.offset for image in images], np.int64),
        "size": np.array([image.image.size for image in images], np.int64),
        "crc": np.array([image.image.crc for image in images], np.uint32),
        "label": flat,
        "name": np.frombuffer(b"".join(image.key for image in images), np.uint8),
        "name_end": np.cumsum([len(image.key) for image in images], dtype=np.uint32),
    }
    if multi_label:
        tensors["label_end"] = np.cumsum([len(labels) for labels in encoded], dtype=np.uint32)
    head = Head(
        format=FORMAT,
        tar_bytes=tar.st_size,
        tar_mtime_ns=tar.st_mtime_ns,
        label_key=label_key,
        count=len(images),
        unusable=sum(bool(labels) and labels[0] < 0 for labels in encoded),
        multi_label=multi_label,
        class_names=class_names,
        smallest=int(integers.min()) if integers.size else None,
        largest=int(integers.max()) if integers.size else None,
        reasons=list(reasons),
        digest=_digest(tensors, class_names, list(reasons)),
    )
    return save(tensors, {"index": json.dumps(dataclasses.asdict(head))})


def _class_names(shard: str, images: Sequence[Labelled]) -> list[str]:
    """Sorted names that labels have; refused where some are numbers instead."""
    example: dict[type, Labelled] = {}
    names: set[str] = set()
    for image in images:
        for label in _listed(image.label):
            example.setdefault(type(label), image)
            if isinstance(label, str):
                names.add(label)
    if len(example) > 1:
        number, name = example[int], example[str]
        raise UserError(
            f"{shard}: labels are numbers for some images and names for others: {number.key.decode(errors='replace')} "
            f"has {number.label!r}, {name.key.decode(errors='replace')} has {name.label!r}"
        )
    return sorted(names)


def _listed(label: Stated | Unusable) -> Sequence[int | str]:
    return [] if isinstance(label, Unusable) else label if isinstance(label, list) else [label]


def _numbers(label: Stated | Unusable, number: Mapping[str, int], reasons: dict[str, int]) -> list[int]:
    """A label as it is stored."""
    numbers = [number[one] if isinstance(one, str) else one for one in _listed(label)]
    wrong = next((one for one in numbers if not 0 <= one <= _LARGEST), None)
    if wrong is not None:
        label = Unusable(f"label {wrong} is not a class")
    if isinstance(label, Unusable):
        return [-1 - reasons.setdefault(str(label), len(reasons))]
    return numbers


def _digest(tensors: Mapping[str, np.ndarray], class_names: Sequence[str], reasons: Sequence[str]) -> str:
    found = hashlib.blake2b(json.dumps([list(class_names), list(reasons)]).encode(), digest_size=16)
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].size};".encode())
        found.update(tensors[name].tobytes())
    return found.hexdigest()
