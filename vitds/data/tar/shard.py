"""A shard that is open: bytes of it, checked against its index."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from vitds.data.class_names import ClassNumbers
from vitds.data.storage import StorageError, retried
from vitds.data.tar.columns import OpenFile
from vitds.data.tar.index import Index, open_index
from vitds.data.tar.members import BLOCK, read_at


class ShardChanged(StorageError):
    """A shard is no longer what was indexed: other images would follow where the run expects its own."""


@dataclass
class Piece:
    """Bytes [start, end) of a tar, and the images in them as (number in the shard, what came with it)."""

    start: int
    end: int
    images: list[tuple[int, int]] = field(default_factory=list)


class Shard:
    """A tar and its index; read by as many threads and forked processes as there are, for no read moves a position.

    Args:
        path: the tar.
        index_path: its index.
        digest: of the index that is expected there.
        numbers: of the classes, where labels are names.

    Raises:
        ShardChanged: the index is another, or gone.
        StorageError: it cannot be read.
    """

    def __init__(self, path: str, index_path: str, digest: str, numbers: ClassNumbers | None) -> None:
        self.path = path
        self.index: Index = retried(lambda: self._open_index(index_path), index_path)
        if self.index.head.digest != digest:
            raise self._changed("its index is another now")
        self.classes = [numbers.of(name) for name in self.index.head.class_names] if numbers else []
        self._file: OpenFile | None = None

    def pieces(self, images: Sequence[tuple[int, int]], gap: int, most: int) -> Iterator[Piece]:
        """The ranges of bytes to read for these images, which come in the order of the tar."""
        piece: Piece | None = None
        for i, mark in images:
            start = self.index.offset[i] - BLOCK
            end = start + BLOCK + self.index.size[i]
            if piece is not None and (start - piece.end > gap or end - piece.start > most):
                yield piece
                piece = None
            if piece is None:
                piece = Piece(start, end)
            piece.end = max(piece.end, end)
            piece.images.append((i, mark))
        if piece is not None:
            yield piece

    def read(self, start: int, length: int) -> bytes:
        """Bytes of the tar.

        Raises:
            ShardChanged: its size or time is not the index's.
            StorageError: it cannot be read.
        """
        return retried(lambda: self._read(start, length), self.path)

    def check(self, i: int, header: memoryview) -> None:
        """Refuses another header than image i had when it was indexed.

        Raises:
            ShardChanged: it is another.
        """
        if zlib.crc32(header) != self.index.crc[i]:
            raise self._changed(f"{self.index.key(i)} is not where it was, at offset {self.index.offset[i]}")

    def _read(self, start: int, length: int) -> bytes:
        file = self._file
        try:
            if file is None:  # at first, and after an error: a file server may have forgotten the descriptor
                file = self._file = OpenFile(self.path)
            about, head = os.fstat(file.descriptor), self.index.head
            if (about.st_size, about.st_mtime_ns) != (head.tar_bytes, head.tar_mtime_ns):
                size = f"{about.st_size} bytes in place of {head.tar_bytes}"
                raise self._changed(size if about.st_size != head.tar_bytes else "it has been written to")
            data = read_at(file.descriptor, start, length)
        except OSError:
            self._file = None
            raise
        if len(data) < length:
            raise self._changed(f"it ends at {start + len(data)}")
        return data

    def _open_index(self, path: str) -> Index:
        try:
            return open_index(path)
        except (ValueError, KeyError, TypeError) as error:
            raise self._changed("its index is none any more") from error

    def _changed(self, what: str) -> ShardChanged:
        return ShardChanged(
            f"{self.path}: the shard has changed since it was indexed: {what}. The run stops, for its images would be "
            "others; put the shard back as it was and start again"
        )
