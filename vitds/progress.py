"""How far a long command has come: a bar on a terminal, now and then a line in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from vitds.json_files import say

LINE_EVERY_SECONDS = 30.0


class Progress:
    """Counts towards `total` on standard error while the block lasts; what takes less than `after` seconds shows nothing.

    Args:
        what: is being done, for the reader.
        total: how much there is to do.
        unit: of `total`.
        after: seconds before anything shows.
    """

    def __init__(self, what: str, total: int, unit: str = "images", after: float = 1.0) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done = 0
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=what, unit=f" {unit}", unit_scale=True, delay=after, leave=False)
        self._started = self._said = time.monotonic()

    def add(self, number: int = 1) -> None:
        """So much more is done."""
        self._done += number
        if self._bar is not None:
            self._bar.update(number)
            return
        now = time.monotonic()
        if now - self._said >= LINE_EVERY_SECONDS:
            self._said = now
            speed = self._done / (now - self._started)
            left = f", {(self._total - self._done) / speed / 60:.0f} min left" if speed else ""
            say(f"vitds: {self._what}: {self._done} of {self._total} {self._unit}, {speed:.0f}/s{left}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
