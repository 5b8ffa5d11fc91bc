"""Tensors in a file, of which small parts are read."""

from __future__ import annotations

import errno
import os

import numpy as np

from vitds.data.tar.members import read_at


class OpenFile:
    """A file descriptor that is closed when the last thread that reads from it lets go."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class Column:
    """A tensor (n,) of an index, of which a part is read when it is looked at.

    Not mapped into memory: where a file server cannot give a page of mapped memory, or has another file there by now, the
    process is killed (SIGBUS), and not asked whether it wants to try again.
    """

    def __init__(self, file: OpenFile, start: int, dtype: type[np.generic], count: int) -> None:
        self._file, self._start, self._dtype, self._count = file, start, np.dtype(dtype), count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> int:
        return int(self.part(i, i + 1)[0])

    def part(self, start: int, end: int) -> np.ndarray:
        """Entries [start, end).

        Raises:
            OSError: they cannot be read.
        """
        assert 0 <= start <= end <= self._count, (start, end, self._count)
        bytes_each = self._dtype.itemsize
        length = (end - start) * bytes_each
        data = read_at(self._file.descriptor, self._start + start * bytes_each, length)
        if len(data) < length:
            raise OSError(errno.EIO, "the index is shorter than it was")
        return np.frombuffer(data, self._dtype)

    @property
    def whole(self) -> np.ndarray:
        """All entries; raises as `part`."""
        return self.part(0, self._count)
