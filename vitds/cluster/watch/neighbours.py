"""The processes of the other ranks on this host: which of them have ended."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

SETTLE_SECONDS = 3.0
"""A process that has ended is believed to be missed only after this: a job that stops in order ends on all ranks."""


def own_card() -> dict[str, Any]:
    """What the others must know of this process: where process ids mean the same, its id, and when it started."""
    with suppress(OSError):
        where = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
        return {"where": where, "pid": os.getpid(), "started": _started(os.getpid())}
    return {}


class Neighbours:
    """The ranks that share this process's host and process ids.

    Args:
        cards: of all ranks, by rank.
        rank: this one.
    """

    def __init__(self, cards: Mapping[int, dict[str, Any]], rank: int) -> None:
        own = cards[rank]
        self._cards = {
            other: card for other, card in cards.items() if other != rank and card and card["where"] == own.get("where")
        }
        self._since: dict[int, float] = {}

    def gone(self) -> list[int]:
        """Those whose processes ended some seconds ago, or have not been reaped since."""
        now = time.monotonic()
        for rank, card in self._cards.items():
            if rank not in self._since and _started(card["pid"]) != card["started"]:
                self._since[rank] = now
        return sorted(rank for rank, since in self._since.items() if now - since >= SETTLE_SECONDS)


def _started(pid: int) -> str | None:
    """When a living process started, in the kernel's ticks; None: it has ended, even if nobody has taken note."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else fields[19].decode()
    except (OSError, IndexError):
        return None
