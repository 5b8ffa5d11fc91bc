"""Which batches are dropped and which stop a run."""

from __future__ import annotations

import math

import pytest

from vitds.checkpoint.state import Progress
from vitds.guard import Guard, NotFinite

HERE = Progress(step=7, position=70)


def outcome(guard: Guard, updates: list[bool]) -> str:
    for number, updated in enumerate(updates):
        try:
            guard.check_update(updated, math.inf, HERE)
        except NotFinite:
            return f"stops at {number}"
    return "goes on"


@pytest.mark.parametrize(
    ("policy", "max_skips", "scaled", "updates", "wanted"),
    [
        ("stop", 10, False, [True, False], "stops at 1"),
        ("skip", 2, False, [False, False, True, False, False, True], "goes on"),
        ("skip", 2, False, [True, False, False, False], "stops at 3"),
        ("skip", 0, False, [False], "stops at 0"),
        ("stop", 2, True, [False, False, True], "goes on"),
        ("stop", 2, True, [False, False, False], "stops at 2"),
    ],
)
def test_policies(policy, max_skips, scaled, updates, wanted):
    assert outcome(Guard(policy, max_skips, scaled), updates) == wanted


def test_a_loss_stops_under_stop_alone_and_says_where():
    with pytest.raises(NotFinite, match="step 7, images from position 70: the loss is nan"):
        Guard("stop", 10, False).check_loss(math.nan, HERE)
    Guard("skip", 10, False).check_loss(math.nan, HERE)
    Guard("stop", 10, False).check_loss(1.0, HERE)
