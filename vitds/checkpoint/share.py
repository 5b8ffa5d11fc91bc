"""What one rank writes of a checkpoint: its files, one after the other, from a stream of bytes."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vitds.checkpoint.files import FileRecord, write_bytes
from vitds.checkpoint.plan import PlannedFile
from vitds.checkpoint.tensorfile import TensorFileWriter, bytes_of

CHUNK_BYTES = 32 * 2**20
"""Staged on the host when a piece that is written at once lies on the device."""


@dataclass
class Written:
    """What became of this rank's files: their records, or why there are none."""

    records: dict[str, FileRecord] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    """Files that were begun."""
    failure: str | None = None
    seconds: float = 0.0


def write_share(
    directory: Path, small: Mapping[str, bytes], files: list[PlannedFile], pieces: Iterator[memoryview]
) -> Written:
    """Write and sync `small` (name -> content), then the tensor files, headers first. Never raises an Exception.

    Args:
        directory: exists.
        files: in the order in which their tensors' bytes come.
        pieces: the bytes of all tensors; run to their end even after a failure, for they may be sent by other ranks,
            which must not wait for ever.
    """
    began, written = time.perf_counter(), Written()
    try:
        for name, content in small.items():
            written.names.append(name)
            written.records[name] = write_bytes(directory / name, content)
        rest = memoryview(b"")
        for file in files:
            written.names.append(file.name)
            writer = TensorFileWriter(directory / file.name, file.specs)
            try:
                left = file.nbytes
                while left:
                    rest = rest or next(pieces)
                    piece, rest = rest[:left], rest[left:]
                    writer.write(piece)
                    left -= len(piece)
            except BaseException:
                writer.abandon()
                raise
            written.records[file.name] = writer.close()
    except Exception as error:
        written.failure = reason_of(error)
    for _ in pieces:
        pass
    written.seconds = time.perf_counter() - began
    return written


def reason_of(error: BaseException) -> str:
    """An error in one line: of the system's its words and the file, of others the type as well."""
    if isinstance(error, OSError) and error.filename is not None:
        hint = "; is the output directory mounted and shared by all hosts?" if error.errno == errno.ENOENT else ""
        return f"{error.filename}: {error.strerror}{hint}"
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


def on_the_host(pieces: Iterator[torch.Tensor]) -> Iterator[memoryview]:
    """Pieces (1-D uint8, on any device) as memory to write; those on the device come over in chunks."""
    for piece in pieces:
        for chunk in [piece] if piece.device.type == "cpu" else piece.split(CHUNK_BYTES):
            yield bytes_of(chunk.cpu())
