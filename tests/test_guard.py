"""Which batches are dropped, which stop a run, which send it back; and which checkpoints that makes useless."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitds.checkpoint.state import Progress
from vitds.errors import UserError
from vitds.guard import Guard, GuardSection, NotFinite, Spike, spoiled

HERE = Progress(step=7, position=70)


class Examined:
    """Stands in for the replay, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        return "the gradient of head.bias is the first"


def outcome(guard: Guard, updates: list[bool], examined: Examined, loss: float = 1.0) -> str:
    for number, updated in enumerate(updates):
        try:
            guard.check_update(updated, loss, math.inf, HERE, examined)
        except NotFinite:
            return f"stops at {number}"
    return "goes on"


@pytest.mark.parametrize(
    ("policy", "max_skips", "scaled", "loss", "updates", "wanted", "examinations"),
    [
        ("stop", 10, False, 1.0, [True, False], "stops at 1", 1),
        ("skip", 2, False, 1.0, [False, False, True, False, False, True], "goes on", 4),
        ("skip", 2, False, 1.0, [True, False, False, False], "stops at 3", 3),
        ("skip", 0, False, 1.0, [False], "stops at 0", 1),
        ("skip", 1, False, math.nan, [False, False], "stops at 1", 2),
        ("stop", 2, True, 1.0, [False, False, True], "goes on", 0),
        ("stop", 2, True, 1.0, [False, False, False], "stops at 2", 1),
        ("skip", 2, True, 1.0, [False, False, True, False], "goes on", 0),
        ("stop", 2, True, math.nan, [False], "stops at 0", 1),
        ("skip", 2, True, math.nan, [False, False], "goes on", 2),
    ],
)
def test_policies(policy, max_skips, scaled, loss, updates, wanted, examinations):
    examined = Examined()
    assert outcome(Guard(GuardSection(policy, max_skips), scaled, []), updates, examined, loss) == wanted
    assert examined.calls == examinations


def test_the_error_says_where_and_what_was_found():
    message = (
        r"step 7, images from position 70: the loss is nan, .*; the gradient of head.bias is the first; .*of step 7"
    )
    with pytest.raises(NotFinite, match=message):
        Guard(GuardSection(), False, []).check_update(False, math.nan, math.nan, HERE, Examined())


@pytest.mark.parametrize("policy", ["off", "stop", "rollback"])
def test_losses_that_are_not_finite_are_dropped(policy):
    guard = Guard(GuardSection(spike=policy), False, [1.0] * 128)
    assert [guard.judge(loss) for loss in (math.nan, math.inf, -math.inf)] == ["drop"] * 3


def falling(steps: int, seed: int = 0) -> list[float]:
    """Losses as a run has them: falling, with noise."""
    noise = random.Random(seed)
    return [2 + 5 / math.sqrt(1 + step) + noise.gauss(0, 0.05) for step in range(steps)]


def run(guard: Guard, losses: list[float]) -> list[int]:
    """The steps at which a spike was seen; their batches make no update."""
    spikes = []
    for step, loss in enumerate(losses):
        if guard.judge(loss) == "spike":
            spikes.append(step)
        else:
            guard.check_update(True, loss, 1.0, HERE, Examined())
    return spikes


def test_a_leap_is_seen_and_noise_and_falls_are_not():
    losses = falling(600)
    assert run(Guard(GuardSection(spike="stop"), False, []), losses) == []
    for step, size in ((64, 8.0), (300, 1.0), (599, 4.0)):
        leaping = [loss + (size if at == step else 0) for at, loss in enumerate(losses)]
        assert run(Guard(GuardSection(spike="rollback"), False, []), leaping) == [step]
        assert run(Guard(GuardSection(), False, []), leaping) == []
    leaping = [loss + (4.0 if at in (200, 201, 203) else 0) for at, loss in enumerate(losses)]
    assert run(Guard(GuardSection(spike="stop"), False, []), leaping) == [200, 201, 203]


def test_too_few_losses_judge_nothing_and_a_flat_window_sees_no_spike_in_rounding():
    section = GuardSection(spike="stop", spike_window=16)
    assert [Guard(section, False, [1.0] * n).judge(50.0) for n in (0, 7, 8, 16)] == ["update"] * 2 + ["spike"] * 2
    flat = Guard(section, False, [2.5] * 16)
    assert flat.judge(2.5001) == "update"
    assert flat.judge(2.53) == "spike"
    assert Guard(section, False, [0.0] * 16).judge(0.0) == "update"


def test_the_deviation_is_the_robust_formula():
    guard = Guard(GuardSection(spike="stop", spike_window=8), False, [9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    assert guard.losses == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]  # the oldest of nine is gone
    assert guard.deviation(20.0) == pytest.approx((20 - 4.5) / (1.4826 * 2 + 4.5e-3))


@given(st.integers(0, 200))
def test_a_resumed_guard_decides_as_one_that_went_on(after):
    losses = [loss + (3.0 if step in (90, 150, 199) else 0) for step, loss in enumerate(falling(200))]
    section = GuardSection(spike="stop", spike_window=32)
    whole = Guard(section, False, [])
    spikes = run(whole, losses)
    assert spikes == [90, 150, 199]
    first = Guard(section, False, [])
    before = run(first, losses[:after])
    second = Guard(section, False, json.loads(json.dumps(first.losses)))
    assert before + [after + step for step in run(second, losses[after:])] == spikes
    assert second.losses == whole.losses
    assert len(whole.losses) == 32


def test_a_spike_stops_a_run_or_sends_it_back_until_that_was_too_often():
    window = [1.0] * 128
    with pytest.raises(Spike, match=r"^step 7, images from position 70: the loss is 9, 8000\.0 robust .* of step 7$"):
        Guard(GuardSection(spike="stop"), False, window).check_spike(9.0, HERE)
    Guard(GuardSection(spike="rollback"), False, window, rollbacks=2).check_spike(9.0, HERE)
    with pytest.raises(Spike, match=r"rolled back 3 time\(s\) before"):
        Guard(GuardSection(spike="rollback"), False, window, rollbacks=3).check_spike(9.0, HERE)


@pytest.mark.parametrize(
    ("position", "own", "skips", "useless"),
    [
        (100, [], [], False),
        (100, [], [[100, 120]], False),  # at the edge: the next batch would be the first of the range
        (110, [], [[100, 120]], True),
        (200, [], [[100, 120]], True),
        (200, [[100, 120]], [[100, 120]], False),
        (200, [[100, 110]], [[100, 120]], True),
        (110, [[100, 110]], [[100, 120]], False),  # dropped all it met of the range
        (200, [[100, 110], [110, 130]], [[100, 120]], False),
        (200, [[110, 120], [100, 110]], [[100, 120]], False),
        (200, [[110, 120]], [[100, 130]], True),
        (200, [[100, 120]], [[100, 120], [150, 160]], True),
        (150, [[100, 120]], [[100, 120], [150, 160]], False),
    ],
)
def test_checkpoints_that_learnt_from_what_was_given_up_are_spoiled(position, own, skips, useless):
    reason = spoiled({"position": position, "skipped": own}, skips)
    assert (reason is not None) == useless
    if reason is not None:
        assert "it learnt from positions" in reason


@given(
    st.integers(0, 30),
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=5),
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=5),
)
def test_spoiled_is_what_sets_of_positions_say(position, own, skips):
    own_ranges, ranges = ([[start, start + length] for start, length in pairs] for pairs in (own, skips))
    learnt = set(range(position)) - {p for start, end in own_ranges for p in range(start, end)}
    given_up = {p for start, end in ranges for p in range(start, end)}
    assert (spoiled({"position": position, "skipped": own_ranges}, ranges) is not None) == bool(learnt & given_up)


def test_a_section_out_of_range_is_refused():
    with pytest.raises(UserError, match=r"vitds.guard.spike_batches: expected at least 1, found 0"):
        GuardSection(spike_batches=0)
