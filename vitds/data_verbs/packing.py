"""A folder's images as tar shards: which image goes where, and how shards come to be all there or not at all.

Shards are made in a folder of their own inside the target and moved out when the last one is finished. A shard is its
images' bytes as they are and nothing of the machine, the moment or the number of processes that made it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vitds.data import Source
from vitds.data.order import Order
from vitds.data.tar import index_path, write_index
from vitds.errors import Stopped, UserError
from vitds.json_files import read_object, write_json

RECORD = "pack.json"
CLASSES = "classes.json"
UNFINISHED = ".packing"
BLOCK = tarfile.BLOCKSIZE
BESIDES = 5 * BLOCK
"""Bytes of a tar that an image takes beside its own: three headers, and two files that are shorter than a block."""


@dataclass(frozen=True)
class Packing:
    """A source of files and the directory that it is packed to."""

    source: Source
    sizes: np.ndarray
    """Bytes of each image, int64 (N,)."""
    order: Order | None
    """The order of the images in the shards; None is the source's own."""
    cuts: np.ndarray
    """Shard s holds the images at [cuts[s], cuts[s + 1]) of that order; int64 (S + 1,)."""
    prefix: str
    to: Path

    @property
    def shards(self) -> range:
        """The numbers of the shards."""
        return range(len(self.cuts) - 1)

    @property
    def work(self) -> Path:
        """Where shards are made."""
        return self.to / UNFINISHED

    def name(self, number: int) -> str:
        """File name of a shard."""
        return f"{self.prefix}-{number:06d}.tar"

    def pattern(self) -> Path:
        """All shards, as source tar takes them."""
        last = len(self.shards) - 1
        return self.to / (f"{self.prefix}-{{000000..{last:06d}}}.tar" if last else self.name(0))

    def images(self, number: int) -> int:
        """Images in a shard."""
        return int(self.cuts[number + 1] - self.cuts[number])

    def begin(self, record: dict[str, Any]) -> list[int]:
        """Begin or go on with what `record` describes; the numbers of the shards that are still to be written.

        Raises:
            UserError: the directory holds something else, or has less space than is needed.
            Stopped: it cannot be written.
        """
        told = next((path for path in (self.to / RECORD, self.work / RECORD) if path.exists()), None)
        if told is not None:
            _check_same(told, record)
        else:
            strange = sorted(name for name in os.listdir(self.to) if name.endswith(".tar") or name == CLASSES)
            if strange:
                raise UserError(f"--to {str(self.to)!r}: holds {strange[0]!r} and no {RECORD}; take another directory")
        missing = [number for number in self.shards if not self._is_there(number)]
        if missing or told != self.to / RECORD:
            needed = sum(int(packed_bytes(self.sizes[self._indices(number)]).sum()) for number in missing)
            free = shutil.disk_usage(self.to).free
            if needed > free:
                raise UserError(
                    f"--to {str(self.to)!r}: {free / 1e9:.3f} GB are free there, {len(missing)} shards take {needed / 1e9:.3f} GB"
                )
            with _written(self.work):
                self.work.mkdir(exist_ok=True)
                write_json(self.work / RECORD, record)
        return missing

    def write(self, number: int) -> int:
        """Write a shard and its index; returns `number`.

        Raises:
            Stopped: the disk is full, or the like; or an image is no longer what it was when it was listed.
            StorageError: an image cannot be read.
        """
        path = self.work / self.name(number)
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            with _written(path):
                with open(temporary, "wb") as file:
                    self._fill(file, number)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
                write_index(str(path), index_path(str(path)))
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return number

    def finish(self) -> None:
        """Give the shards their true places, and last of all the record that says that they are all there.

        Raises:
            Stopped: the directory cannot be written.
        """
        if not self.work.exists():
            return
        with _written(self.to):
            write_json(self.to / CLASSES, list(self.source.class_names))
            for number in self.shards:
                for path in (self.work / self.name(number), Path(index_path(str(self.work / self.name(number))))):
                    if path.exists():  # not moved by a start before this one
                        os.replace(path, self.to / path.name)
            os.replace(self.work / RECORD, self.to / RECORD)
            shutil.rmtree(self.work)

    def _is_there(self, number: int) -> bool:
        paths = (place / self.name(number) for place in (self.to, self.work))
        return any(path.exists() and os.path.exists(index_path(str(path))) for path in paths)

    def _indices(self, number: int) -> np.ndarray:
        positions = np.arange(self.cuts[number], self.cuts[number + 1])
        return positions if self.order is None else self.order.indices(positions)

    def _fill(self, file: BinaryIO, number: int) -> None:
        for position, index in enumerate(self._indices(number).tolist(), int(self.cuts[number])):
            image, label, key = self.source.read(index)
            assert isinstance(image, bytes) and isinstance(label, int), key
            if len(image) != self.sizes[index]:
                raise Stopped(
                    f"{key}: had {self.sizes[index]} bytes when it was listed and has {len(image)}; run again"
                )
            told = {"label": label, "class": self.source.class_names[label], "path": key}
            _add(file, f"{position:09d}{os.path.splitext(key)[1].lower()}", image)
            _add(file, f"{position:09d}.cls", str(label).encode())
            _add(file, f"{position:09d}.json", json.dumps(told).encode())
        file.write(bytes(2 * BLOCK))


def packed_bytes(sizes: np.ndarray) -> np.ndarray:
    """Bytes that images of these sizes (N,) take in a tar, int64 (N,); exact where their paths are not very long."""
    return -(-sizes // BLOCK) * BLOCK + BESIDES


def cut(sizes: np.ndarray, most: int) -> np.ndarray:
    """Where to cut images of these packed sizes (N,) so that no shard holds more than `most` bytes, if not one image."""
    ends = np.cumsum(sizes)
    cuts = [0]
    while cuts[-1] < len(sizes):
        before = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
        cuts.append(max(cuts[-1] + 1, int(np.searchsorted(ends, before + most, side="right"))))
    return np.array(cuts, dtype=np.int64)


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """In the directory, which is made, no second command of this host writes as long as the block lasts.

    Raises:
        UserError: one does, or the directory cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--to {str(directory)!r}: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"--to {str(directory)!r}: another command is packing there") from None
    finally:
        os.close(handle)


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    """Says what it means that `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise Stopped(
            f"{path}: cannot be written ({error.strerror or error}); finished shards are kept, and the same command "
            "goes on with the others"
        ) from None


def _add(file: BinaryIO, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # mode 644, and neither a time nor an owner
    member.size = len(data)
    file.write(member.tobuf(tarfile.USTAR_FORMAT))
    file.write(data)
    file.write(bytes(-len(data) % BLOCK))


def _check_same(path: Path, record: dict[str, Any]) -> None:
    """Refuses a directory that was packed, or begun, otherwise."""
    before = read_object(path)
    differing = [word for word in {**before, **record} if before.get(word) != record.get(word)]
    if differing:
        shown = "; ".join(f"{word} {before.get(word)!r} there, {record.get(word)!r} now" for word in differing)
        raise UserError(f"{path}: packed from something else or in another way: {shown}. Take another --to")
