"""Images that cannot be used: named, counted, and no more of them than the run file allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from vitds import dist
from vitds.data.sources import Role
from vitds.errors import UserError


@dataclasses.dataclass(frozen=True)
class BadSample:
    """An image that could not be used, and the position (or evaluation index) at which it was met."""

    key: str
    reason: str
    position: int


class BadSamples:
    """The bad samples of one loader, each counted once however often it is met."""

    def __init__(self, role: Role, cap: int) -> None:
        self.role: Role = role
        self.cap = cap
        self.found: list[BadSample] = []
        self._keys: set[str] = set()
        self._told = 0

    def untold(self) -> list[dict[str, Any]]:
        """What all ranks have found since the last call. Collective."""
        mine = [dataclasses.asdict(bad) for bad in self.found[self._told :]]
        self._told = len(self.found)
        return [bad for found in dist.all_objects(mine) for bad in found]

    def add(self, met: Sequence[BadSample]) -> None:
        """Count those that are new.

        Raises:
            UserError: they are more than the cap.
        """
        for bad in met:
            if bad.key not in self._keys:
                self._keys.add(bad.key)
                self.found.append(bad)
        if len(self.found) > self.cap:
            error = UserError(too_many_bad(self.found, self.cap, self.role))
            error.agreed = False  # the other ranks' images may be fine
            raise error


def too_many_bad(bad_samples: Sequence[BadSample], cap: int, role: Role) -> str:
    """The message when more images cannot be decoded than the run file allows."""
    distinct = list({bad.key: bad for bad in bad_samples}.values())
    listed = "; ".join(f"{bad.key} ({bad.reason})" for bad in distinct[:3]) + ("; …" if len(distinct) > 3 else "")
    count = f"all {len(distinct)} images" if len(distinct) <= cap else f"{len(distinct)} images"
    return f"vitds.data.{role}: {count} cannot be decoded (vitds.data.max_bad_samples is {cap}): {listed}"
