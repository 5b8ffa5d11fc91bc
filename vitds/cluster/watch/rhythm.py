"""How long a rank may go without progress, learnt from how long it went before."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from vitds.cluster.section import ClusterSection

ROUNDS = 32
"""Rounds of a phase that are remembered: a round is one step, one evaluation, one save."""
START, STEP = "start", "step"


class Pulse(NamedTuple):
    """The last sign of progress. Replaced as a whole, so that another thread may read it at any time."""

    beats: int
    step: int
    phase: str
    since: float
    """When, by the rhythm's clock."""
    absent: float
    """`Rhythm.absent` then."""
    bound: float


class Rhythm:
    """The beats of one thread, by phase.

    A phase that has not had a whole round yet has `first_seconds`; afterwards max(hang_seconds, hang_factor × longest
    interval of its last rounds). The first round, which compiles, counts only while it is the only one. An interval past
    its bound teaches nothing: the process was suspended, or the bound was about to be acted on.
    """

    def __init__(self, section: ClusterSection, clock: Callable[[], float] = time.monotonic) -> None:
        self._section, self._clock = section, clock
        self._rounds: dict[str, deque[float]] = {}
        self._fixed = {START}
        self._young: set[str] = set()
        """Phases whose only round is their first."""
        self._outer: list[tuple[str, float]] = []
        self._longest = 0.0
        """Of the round under way."""
        self.absent = 0.0
        """Seconds in which this process did not run at all; grown by whoever notices."""
        self.pulse = Pulse(0, 0, START, clock(), 0.0, self._bound(START))

    def beat(self, step: int) -> None:
        """There is progress; `step` updates have been made."""
        last = self.pulse
        phase = last.phase if self._outer else STEP
        if phase == last.phase:
            self._learn()
            if step != last.step and not self._outer:
                self._end_round(phase)
        self.pulse = Pulse(last.beats + 1, step, phase, self._clock(), self.absent, self._bound(phase))

    def enter(self, phase: str, learns: bool = True) -> None:
        """What follows is another phase, whose end is `leave`; one that does not learn has `first_seconds` every time."""
        last = self.pulse
        if not learns:
            self._fixed.add(phase)
        self._outer.append((last.phase, self._longest))
        self._longest = 0.0
        self.pulse = last._replace(phase=phase, since=self._clock(), absent=self.absent, bound=self._bound(phase))

    def leave(self) -> None:
        """The phase before comes back."""
        self._learn()
        self._end_round(self.pulse.phase)
        phase, self._longest = self._outer.pop()
        self.pulse = self.pulse._replace(phase=phase, since=self._clock(), absent=self.absent, bound=self._bound(phase))

    def silence(self, pulse: Pulse) -> float:
        """Seconds that this process has run since then."""
        return max(0.0, self._clock() - pulse.since - (self.absent - pulse.absent))

    def _learn(self) -> None:
        interval = self._clock() - self.pulse.since
        if interval <= self.pulse.bound:
            self._longest = max(self._longest, interval)

    def _end_round(self, phase: str) -> None:
        rounds = self._rounds.setdefault(phase, deque(maxlen=ROUNDS))
        if phase in self._young:
            self._young.remove(phase)
            rounds.clear()
        elif not rounds:
            self._young.add(phase)
        rounds.append(self._longest)
        self._longest = 0.0

    def _bound(self, phase: str) -> float:
        section, rounds = self._section, self._rounds.get(phase)
        if not section.hang_seconds:
            return math.inf
        if not rounds or phase in self._fixed:
            return section.first_seconds
        return max(section.hang_seconds, section.hang_factor * max(rounds))
