"""Mistakes of the user's, told apart from faults of ours.

A `UserError` reaches the user as one message from one rank with exit code 2 (docs/design.md §3.8);
every other exception keeps its traceback and exits 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_PREEMPTED = 75
"""Exit code of a run that was asked to stop and has saved: run it again."""


class UserError(ValueError):
    """The user's input cannot be used as it is.

    The message names the file, key or host, the value, what is allowed and the nearest right word.
    """

    agreed = True
    """Every rank raises it; False where one rank alone does, and the others wait for it (an image of its own, say)."""


class Stopped(RuntimeError):
    """The run cannot go on, for a reason that every rank knows: one message, exit code 1. What was saved before is on disk."""


class Preempted(RuntimeError):
    """All ranks agreed to stop here and be started again; exit code 75 once the state is saved."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the allowed word closest to `word`, or an empty string when none is close."""
    by_lower = {candidate.lower(): candidate for candidate in allowed}
    close = difflib.get_close_matches(str(word).lower(), list(by_lower), n=1, cutoff=0.6)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


def one_of(what: str, value: object, allowed: Iterable[str]) -> str:
    """The message for a value that is not among the allowed ones: `what`, the value, the nearest, the list."""
    names = list(allowed)
    return f"{what}: {value!r} is not known{nearest(str(value), names)}; allowed: {', '.join(map(str, names))}"
