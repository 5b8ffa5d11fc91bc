"""The run file's `vitds.cluster`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vitds.errors import UserError
from vitds.sections import check_least, key

PATH = "vitds.cluster"


@dataclass(frozen=True)
class ClusterSection:
    """How many ranks a run may have, when one of them counts as hung, and when as slow."""

    min_gpus: int | None = key(None, "Least number of ranks this run starts on; null: one.")
    max_gpus: int | None = key(None, "Most ranks this run starts on; null: any number.")
    hang_seconds: float = key(
        300.0, "A step, save or evaluation without progress for so long may be a hang: the least bound; 0: never."
    )
    hang_factor: float = key(10.0, "The bound grows to so many times the longest wait of the last 32 of its kind.")
    first_seconds: float = key(
        1800.0, "The bound of what this start has not done yet: joining, loading, the first step and what it compiles."
    )
    straggler_every_steps: int = key(100, "Steps between two comparisons of the ranks' speed; 0: never.")
    straggler_factor: float = key(1.3, "A rank is slow when its own work takes so many times the ranks' median.")

    def __post_init__(self) -> None:
        check_least(
            PATH, self, min_gpus=1, max_gpus=1, hang_seconds=0, hang_factor=1, first_seconds=1, straggler_every_steps=0
        )
        for name in ("hang_seconds", "hang_factor", "first_seconds", "straggler_factor"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{PATH}.{name}: expected a finite number, found {getattr(self, name)}")
        if self.straggler_factor <= 1:
            raise UserError(f"{PATH}.straggler_factor: expected more than 1, found {self.straggler_factor}")
        if self.max_gpus is not None and self.max_gpus < (self.min_gpus or 1):
            raise UserError(f"{PATH}.max_gpus: expected at least min_gpus ({self.min_gpus}), found {self.max_gpus}")
        if self.hang_seconds and self.first_seconds < self.hang_seconds:
            raise UserError(
                f"{PATH}.first_seconds: expected at least hang_seconds ({self.hang_seconds:g}), found "
                f"{self.first_seconds:g}; what happens for the first time takes longest"
            )


def check_world_size(section: ClusterSection, world_size: int, hosts: Sequence[str] = ()) -> None:
    """A run must have as many ranks as its run file allows.

    Args:
        section: the run file's.
        world_size: ranks there are.
        hosts: where they are, if that is known; named in the error.

    Raises:
        UserError: too few or too many; names the key, its value and the world size.
    """
    where = f" on {', '.join(dict.fromkeys(hosts))}" if hosts else ""
    if section.min_gpus is not None and world_size < section.min_gpus:
        raise UserError(
            f"{PATH}.min_gpus is {section.min_gpus}, and this start has {world_size} rank(s){where}; add hosts or slots, "
            f"or set {PATH}.min_gpus={world_size}"
        )
    if section.max_gpus is not None and world_size > section.max_gpus:
        raise UserError(
            f"{PATH}.max_gpus is {section.max_gpus}, and this start has {world_size} ranks{where}; use fewer slots, or "
            f"set {PATH}.max_gpus={world_size}"
        )
