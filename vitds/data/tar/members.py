"""The files in a tar and where their bytes lie, found in one pass over its headers.

Python's own tarfile would do, several times slower. ustar, GNU and pax (POSIX.1-2008) are read, and the older forms from
before them; what is no regular file is passed over.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from vitds.data.storage import retried
from vitds.errors import UserError

BLOCK = 512
WINDOW = 4 << 20
"""Bytes of one read. Images are read through on the way from header to header: object stores and disks alike are quicker at
that than at a small read for each."""
_ZERO = bytes(BLOCK)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}

_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices, folders, pipes."""
_PAX = (b"x", b"X")


class Member(NamedTuple):
    """A regular file in a tar."""

    name: bytes
    offset: int
    """Of its data; its header is the block before."""
    size: int
    crc: int
    """crc32 of that header."""


class Members:
    """The regular files of an open tar, in order.

    Raises:
        UserError: while iterating: the tar is truncated, compressed, none at all, or of a kind whose files do not lie in
            one piece; with the offset.
        StorageError: it cannot be read.
    """

    def __init__(self, descriptor: int, path: str) -> None:
        self.path = path
        self.size = os.fstat(descriptor).st_size
        self._descriptor = descriptor
        self._start, self._window = 0, b""

    def bytes_of(self, member: Member) -> bytes:
        """What is in the file."""
        return self._bytes(member.offset, member.size)

    def __iter__(self) -> Iterator[Member]:
        offset = 0
        for_all: dict[bytes, bytes] = {}
        for_next: dict[bytes, bytes] = {}
        while True:
            block = self._bytes(offset, BLOCK)
            if block == _ZERO:
                return
            size, kind, start = self._checked(block, offset), block[156:157], offset + BLOCK
            if kind in _PAX:
                for_next |= self._records(start, size)
            elif kind == b"g":
                for_all |= self._records(start, size)
            elif kind == b"L":  # GNU: the name of the next, where it is long
                for_next[b"path"] = self._bytes(start, size).split(b"\0", 1)[0]
            elif kind == b"K":  # and that of what it links to
                pass
            else:
                about = {**for_all, **for_next} if for_all or for_next else {}
                if kind == b"S" or any(key.startswith(b"GNU.sparse.") for key in about):
                    raise self._wrong(offset, "a sparse file, which does not lie in one piece; pack it anew")
                name = about.get(b"path") or _name(block)
                if b"size" in about:
                    size = int(about[b"size"])
                if kind in _WITHOUT_DATA or (kind == b"\0" and name.endswith(b"/")):
                    size = 0  # whatever it states
                elif kind in _REGULAR:
                    if start + size > self.size:
                        raise self._truncated(offset)
                    yield Member(name, start, size, zlib.crc32(block))
                for_next = {}
            offset = start + -(-size // BLOCK) * BLOCK

    def _checked(self, block: bytes, offset: int) -> int:
        """The size that a header states."""
        try:
            stated = _number(block[148:156])
            if stated != _sum(block) and stated != _signed_sum(block):
                raise ValueError
            return _number(block[124:136])
        except ValueError:
            compressed = [kind for magic, kind in _COMPRESSED.items() if offset == 0 and block.startswith(magic)]
            if compressed:
                raise UserError(
                    f"{self.path}: compressed ({compressed[0]}): images in it cannot be read by offset; decompress it"
                ) from None
            raise self._wrong(offset, "no header of a tar; damaged, or no tar") from None

    def _records(self, start: int, size: int) -> dict[bytes, bytes]:
        """The records of a pax header, `<length> <key>=<value>\\n` each."""
        data, at, found = self._bytes(start, size), 0, {}
        try:
            while at < len(data) and data[at]:
                blank = data.index(b" ", at)
                end = at + int(data[at:blank])
                key, equals, value = data[blank + 1 : end - 1].partition(b"=")
                if not equals or data[end - 1 : end] != b"\n":
                    raise ValueError
                found[key] = value
                at = end
        except ValueError:
            raise self._wrong(start, "no pax header") from None
        return found

    def _bytes(self, offset: int, length: int) -> bytes:
        at = offset - self._start
        if at < 0 or at + length > len(self._window):
            if offset + length > self.size:
                raise self._truncated(offset)
            self._start, at = offset, 0
            self._window = retried(lambda: read_at(self._descriptor, offset, max(length, WINDOW)), self.path)
            if len(self._window) < length:
                raise self._truncated(offset)
        return self._window[at : at + length]

    def _truncated(self, offset: int) -> UserError:
        return self._wrong(
            offset, f"it ends at {self.size} without an end mark, as what is half copied does; copy it again"
        )

    def _wrong(self, offset: int, what: str) -> UserError:
        return UserError(f"{self.path}: at offset {offset}: {what}")


def read_at(descriptor: int, offset: int, length: int) -> bytes:
    """These bytes of the file, or as many as there are before its end."""
    data = os.pread(descriptor, length, offset)
    if len(data) == length:
        return data
    parts = [data]
    while parts[-1] and (left := length - sum(map(len, parts))) > 0:  # one call gives at most 2 GiB
        parts.append(os.pread(descriptor, left, offset + length - left))
    return b"".join(parts)


def _name(block: bytes) -> bytes:
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:  # GNU, which writes `ustar  `, keeps other things there
        return block[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _number(field: bytes) -> int:
    """Octal text, or a big-endian number marked by the highest bit."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    value = int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    if value < 0:
        raise ValueError
    return value


def _sum(block: bytes) -> int:
    return sum(block[:148]) + 256 + sum(block[156:])


def _signed_sum(block: bytes) -> int:
    """As some old programs added the bytes up."""
    return _sum(block) - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
