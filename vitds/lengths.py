"""How long a run is and how often what is done beside its steps, all in steps."""

from __future__ import annotations

from dataclasses import dataclass

from vitds.schedules import Schedule


@dataclass(frozen=True)
class Lengths:
    """The run file's lengths in optimizer steps; an interval of 0 is never (evaluation and saving: at the end only)."""

    total: int
    log: int
    evaluate: int
    probe: int
    diagnose: int
    save: int
    schedule: Schedule

    def due(self, interval: int, step: int) -> bool:
        """Whether what is done at an interval is done after `step` updates; at the end it always is."""
        return step == self.total or (interval > 0 < step and step % interval == 0)

    def diagnosed(self, step: int) -> bool:
        """Whether the update that makes `step` updates is looked at more closely; the last one is like any other."""
        return self.diagnose > 0 and step % self.diagnose == 0
