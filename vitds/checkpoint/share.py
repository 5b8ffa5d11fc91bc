"""What one rank writes of a checkpoint: its files, one after the other, from a stream of bytes or a copy of them."""

from __future__ import annotations

import errno
import mmap
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vitds.checkpoint.files import FileRecord, write_bytes
from vitds.checkpoint.plan import PlannedFile
from vitds.checkpoint.tensorfile import TensorFileWriter, bytes_of
from vitds.host_memory import page_lock

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


class HostCopy:
    """Host memory for a copy of this rank's share: `data`, 1-D uint8, uninitialised, of use while this object lives.

    Processes that are forked, such as a loader's workers, do not get it: they could not read it, and the next save,
    while they live, need not copy each page that it writes to. On CUDA it is page-locked where that can be had.

    Raises:
        OSError: no such memory.
    """

    def __init__(self, nbytes: int) -> None:
        self.data = torch.empty(0, dtype=torch.uint8)
        if nbytes == 0:
            return
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_DONTFORK)
        self.data = torch.frombuffer(memory, dtype=torch.uint8)
        page_lock(self.data, owner=self)


def write_share(
    directory: Path, small: Mapping[str, bytes], files: list[PlannedFile], pieces: Iterable[memoryview]
) -> Written:
    """Write and sync `small` (name -> content), then the tensor files, headers first.

    What fails in writing is in the answer, never raised: pieces are taken to their end even then, for other ranks may
    be sending them, and must not wait for ever. What `pieces` raises is raised: then it is they who wait, and nothing
    can be agreed any more.

    Args:
        directory: exists.
        files: in the order in which their tensors' bytes come.
        pieces: the bytes of all tensors.
    """
    began, written = time.perf_counter(), Written()
    writing, done = _writing(directory, small, files, written), False

    def go_on(piece: memoryview | None) -> None:
        nonlocal done
        try:
            if not done and written.failure is None:
                writing.send(piece)
        except StopIteration:
            done = True
        except Exception as error:
            written.failure = reason_of(error)

    go_on(None)
    for piece in pieces:
        go_on(piece)
    assert done or written.failure is not None, f"{directory}: too few bytes for its files"
    written.seconds = time.perf_counter() - began
    return written


def _writing(
    directory: Path, small: Mapping[str, bytes], files: list[PlannedFile], written: Written
) -> Generator[None, memoryview | None]:
    """Writes, and asks for the next piece; what becomes of it goes into `written`."""
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
                rest = rest or (yield) or rest
                piece, rest = rest[:left], rest[left:]
                writer.write(piece)
                left -= len(piece)
        except BaseException:
            writer.abandon()
            raise
        written.records[file.name] = writer.close()


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
