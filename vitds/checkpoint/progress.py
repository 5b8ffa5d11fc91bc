"""How far a run is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vitds.data.skips import hop, merged, reach_back


@dataclass
class Progress:
    """How far a run is; with the tensors, all that a resume needs."""

    step: int = 0
    """Updates made."""
    position: int = 0
    """Next global position of the image stream; where a skipped range begins there, the stream goes on behind it."""
    images_seen: int = 0
    """Images whose gradient was applied."""
    skipped: list[list[int]] = field(default_factory=list)
    """[start, end) of positions whose batch was dropped, or is to be."""
    evaluated: int = 0
    """Step of the last evaluation that came to its end."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """What it measured; None where that was not finite."""
    losses: list[float] = field(default_factory=list)
    """The last losses, by which the guard knows a spike."""

    def mark(self) -> tuple[int, int]:
        """What tells this state from every other of the run."""
        return self.position, self.evaluated

    def last_batches(self, number: int, global_batch: int) -> tuple[int, int]:
        """Positions [start, end) of the last global batches, the one under way included."""
        begun = hop(self.position, self.skipped)
        return reach_back(begun, number, global_batch, self.skipped), begun + global_batch

    def advance(self, global_batch: int, updated: bool) -> list[int]:
        """One global batch further; a dropped one moves the position alone. Returns its positions [start, end)."""
        start = hop(self.position, self.skipped)
        self.position = start + global_batch
        if updated:
            self.step += 1
            self.images_seen += global_batch
        else:
            self.skip(start, self.position)
        return [start, self.position]

    def skip(self, start: int, end: int) -> None:
        """Leave out the positions [start, end), which may have been left out already."""
        self.skipped = [list(span) for span in merged([*self.skipped, [start, end]])]
