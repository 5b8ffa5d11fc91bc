"""Whether a run that has ended is started again: a pure function of how its attempts ended."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

LONGEST_WAIT_SECONDS = 300.0
SAME_FAILURES = 3
"""So many attempts in a row that fail at one step for one reason on the same hosts would fail for ever."""
ASKED_TO_STOP = ("SIGUSR1", "SIGINT")
"""Signals that nobody sends to ranks but to stop the job: a batch system ahead of its limit, a person. A SIGTERM that did
not come through us is what a host sends when it shuts down, and the others can go on."""


@dataclass(frozen=True)
class Limits:
    """How often a run may be started again."""

    max_restarts: int = 0
    """In a row without a new checkpoint; also within `window` seconds, checkpoints or not."""
    window: float = 3600.0
    backoff: float = 5.0
    """Seconds before the first restart; twice as many before each next one that follows no new checkpoint."""


@dataclass(frozen=True)
class Attempt:
    """How one start of the command ended."""

    code: int
    """What `vitds run` alone would return for it."""
    reason: str
    state: str | None = None
    """Of outcome.json, if this attempt wrote one; so is the next."""
    said_code: int | None = None
    signalled: bool = False
    """A signal came through `vitds run`: the job is being stopped."""
    preempted_by: str = ""
    """What the ranks gave as the reason why they saved and stopped."""
    advanced: bool = False
    """It left a checkpoint past all that were there."""
    step: int = 0
    hosts: tuple[str, ...] = ()
    """Where it ran."""
    started: bool = True
    """False: too few hosts answered, and the command was not started."""
    ended: float = 0.0
    """By a monotonic clock, in seconds."""

    @property
    def refused(self) -> bool:
        """The user's input was wrong. Launchers rewrite codes, so that outcome.json counts where it was written."""
        return (self.code if self.state is None else self.said_code) == 2


@dataclass(frozen=True)
class Verdict:
    """What becomes of the run."""

    what: str
    """restart, done (nothing is wrong) or give up."""
    reason: str
    wait: float = 0.0
    """Seconds before a restart."""
    in_a_row: int = 0
    """Which restart without a new checkpoint that is."""


def verdict(attempts: Sequence[Attempt], limits: Limits) -> Verdict:
    """What to do after the last of these attempts."""
    last = attempts[-1]
    if last.state == "finished":
        return Verdict("done", "finished")
    if last.signalled:
        return Verdict("done", "stopped by a signal")
    if last.state == "preempted" and last.preempted_by in ASKED_TO_STOP:
        return Verdict("done", f"its ranks were asked to stop by {last.preempted_by}")
    if last.refused:
        return Verdict("give up", "the input is wrong (exit code 2): a restart would be refused as well")
    in_a_row = next((n for n, one in enumerate(reversed(attempts), 1) if one.advanced), len(attempts))
    recent = sum(last.ended - one.ended < limits.window for one in attempts[:-1])
    newest = attempts[-SAME_FAILURES:]
    if len(newest) == SAME_FAILURES and all(one.started and _same(one, last) for one in newest):
        why = f"the same failure {SAME_FAILURES} times in a row at step {last.step}: {last.reason}"
    elif in_a_row > limits.max_restarts:
        why = f"{limits.max_restarts} restart(s) in a row without a new checkpoint; the last failure: {last.reason}"
    elif recent >= limits.max_restarts:
        why = f"{recent} restart(s) within {limits.window:g} s; the last failure: {last.reason}"
    else:
        wait = min(limits.backoff * 2.0 ** min(in_a_row - 1, 30), LONGEST_WAIT_SECONDS)
        return Verdict("restart", last.reason, wait, in_a_row)
    return Verdict("give up", why)


def _same(one: Attempt, other: Attempt) -> bool:
    return (one.step, _without_numbers(one.reason), one.hosts) == (
        other.step, _without_numbers(other.reason), other.hosts,
    )  # fmt: skip


def _without_numbers(reason: str) -> str:
    """Times, addresses, pids and ports differ between two failures that are the same."""
    return re.sub(r"0x[0-9a-fA-F]+|[0-9]+(\.[0-9]+)?", "#", reason)
