"""Files that are on the disk when we say so, and JSON that means one thing only."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitds.errors import UserError

JSON_BYTES = 100_000_000
"""The largest JSON that is read: more is damage or malice, not a checkpoint."""
HASHED_AT_ONCE = 4 * 2**20


@dataclass(frozen=True)
class FileRecord:
    """What the manifest keeps of a file: its length in bytes and the SHA-256 of its content, in hex."""

    bytes: int
    sha256: str


class DurableFile:
    """A new file, hashed while it is written and synced to the disk before `close` returns.

    The hash is of what was meant to be written, not of what a disk gives back. Every OSError names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, data: Any) -> None:
        """Append `data`, any contiguous buffer.

        Raises:
            OSError: the disk is full, a limit is met, …
        """
        view = memoryview(data).cast("B")
        self._bytes += len(view)
        with self._named():
            while len(view):
                # Hashed and written while it is in the processor's cache; both let other threads run.
                piece, view = view[:HASHED_AT_ONCE], view[HASHED_AT_ONCE:]
                self._hash.update(piece)
                while len(piece):
                    piece = piece[os.write(self._handle, piece) :]

    def close(self) -> FileRecord:
        """Sync, close, and tell what was written."""
        with self._named():
            try:
                os.fsync(self._handle)
            finally:
                os.close(self._handle)
        return FileRecord(self._bytes, self._hash.hexdigest())

    def abandon(self) -> None:
        """Close without a promise."""
        with contextlib.suppress(OSError):  # on a file system that has gone, closing fails too
            os.close(self._handle)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """What fails on a handle does not know the file's name."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def write_bytes(path: Path, data: bytes) -> FileRecord:
    """A whole small file at once."""
    file = DurableFile(path)
    try:
        file.write(data)
    except BaseException:
        file.abandon()
        raise
    return file.close()


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable: a synced file can still lose its name in a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex, in bounded memory."""
    digest = hashlib.sha256()
    buffer = bytearray(HASHED_AT_ONCE)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def to_json(value: dict[str, Any]) -> bytes:
    """JSON text for a person to read; NaN and infinities, which JSON does not have, raise ValueError."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: missing, unreadable, larger than JSON_BYTES, not UTF-8, not an object, a key twice, not finite.
    """
    try:
        size = path.stat().st_size
        if size > JSON_BYTES:
            raise UserError(f"{path}: {size:,} bytes are too many for JSON of ours (limit {JSON_BYTES:,})")
        text = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_json(text, str(path))


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """The object in strict JSON text; `where` is named in errors (UserError, see `read_json`)."""
    try:
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_not_json, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return value


def _not_json(word: str) -> Any:
    raise ValueError(f"{word} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is out of range")
    return value
