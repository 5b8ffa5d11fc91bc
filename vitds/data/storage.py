"""Reading from storage that may fail for a moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from vitds.json_files import say

RETRY_AFTER_SECONDS = (0.1, 0.5, 2.0, 8.0, 30.0)
SAID_AFTER = 3
"""Attempts that fail in silence: a file server that hiccups needs no words."""

T = TypeVar("T")


class StorageError(Exception):
    """Storage failed, several times over. It says nothing of the image, which therefore is not replaced: the run stops
    and goes on from its last checkpoint when the storage is back.

    No RuntimeError or OSError: of those, "Connection timed out" would pass for what torch says of a lost rank.
    """


def retried(read: Callable[[], T], what: str) -> T:
    """`read()`; what raises OSError is tried again, for about 40 seconds in all.

    Args:
        read: the attempt.
        what: path for the message.

    Raises:
        StorageError: the last attempt failed too.
    """
    for attempt, delay in enumerate((*RETRY_AFTER_SECONDS, None), 1):
        try:
            return read()
        except OSError as error:
            if delay is None:
                raise StorageError(
                    f"{what}: cannot be read ({error.strerror or error}), {attempt} attempts in "
                    f"{sum(RETRY_AFTER_SECONDS):.0f} s"
                ) from error
            if attempt >= SAID_AFTER:
                say(f"vitds: {what}: cannot be read ({error.strerror or error}); trying again in {delay:g} s")
            time.sleep(delay)
    raise AssertionError


def read_file(path: str) -> bytes:
    """The file's bytes.

    Raises:
        StorageError: as `retried`.
    """

    def read() -> bytes:
        with open(path, "rb") as file:
            return file.read()

    return retried(read, path)
