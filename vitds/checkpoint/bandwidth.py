"""How fast the ranks that will write checkpoints can write, tried on the disk that will hold them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection
from pathlib import Path

from vitds import dist
from vitds.checkpoint.files import DurableFile
from vitds.checkpoint.format import TEMPORARY
from vitds.checkpoint.gather import together
from vitds.errors import Stopped


def write_bandwidth(directory: Path, nbytes: int, writers: Collection[int] | None = None) -> float:
    """Bytes per second of the slowest writer when all writers at once write, hash and sync `nbytes` each; the same on
    all ranks. Collective. The files are removed again.

    Args:
        writers: ranks; None: all.

    Raises:
        Stopped: on all ranks alike: it cannot be written there.
    """
    path = directory / f"bandwidth-{dist.rank()}{TEMPORARY}"
    block, seconds = memoryview(os.urandom(min(nbytes, 2**24))), [0.0]

    def write() -> None:
        began, left = time.perf_counter(), nbytes
        file = DurableFile(path)
        try:
            while left > 0:
                file.write(block[:left])
                left -= len(block)
        except BaseException:
            file.abandon()
            raise
        file.close()
        seconds[0] = time.perf_counter() - began

    def make() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)

    try:
        together(make, writers)
        together(write, writers)
    except RuntimeError as error:
        raise Stopped(f"{directory}: cannot be written to: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    return nbytes / max(1e-9, *dist.all_objects(seconds[0]))
