"""Schedules against the reference's published values, its equations written out again, and hand-made numbers."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest

from vitds import sections
from vitds.errors import UserError
from vitds.schedules import SCHEDULES, Schedule, SchedulerSection, build_schedule

VIT_G = {"warmup_steps": 10_000, "timescale_steps": 10_000, "cooldown_steps": 50_000}


def build(type: str, total: int = 100, **params: float) -> Schedule:
    return build_schedule(
        {"type": type, "params": params}, total_steps=total, global_batch=4096, images_per_epoch=40_960
    )


def reference(
    type: str, k: int, *, T: int, W: int = 0, K: int = 0, timescale: float = 10_000, shift: float = 0, end: float = 0
) -> float:
    """create_learning_rate_schedule of the reference, from its description, one step at a time."""
    p = min(1.0, max(0.0, (k - W) / (T - W)))
    if type == "cosine":
        s = 0.5 * (1 + math.cos(math.pi * p))
    elif type == "linear":
        s = end + (1 - end) * (1 - p)
    elif type == "rsqrt":
        s = (1 + (k + shift - W) / timescale) ** -0.5 if k >= W else (1 + shift / timescale) ** -0.5
    else:
        s = 1.0
    if W:
        s *= min(1.0, k / W)
    if K:
        s *= min(1.0, (T - k) / K)
    return s


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.0),
        (1, 1e-4),
        (5000, 0.5),
        (9999, 0.9999),
        (10_000, 1.0),
        (20_000, 0.70711),
        (100_000, 0.31623),
        (500_000, 0.14142),
        (950_000, 0.102598),
        (975_000, 0.050637),
        (999_999, 2.0e-6),
    ],
)
def test_the_paper_s_schedule(step: int, factor: float) -> None:
    assert build("rsqrt", 1_000_000, **VIT_G)(step) == pytest.approx(factor, rel=1e-5)


@pytest.mark.parametrize(
    ("type", "params", "step", "factor"),
    [
        ("constant", {}, 0, 1.0),
        ("constant", {"warmup_steps": 10}, 0, 0.0),
        ("constant", {"warmup_steps": 10}, 3, 0.3),
        ("constant", {"cooldown_steps": 20}, 80, 1.0),
        ("constant", {"cooldown_steps": 20}, 90, 0.5),
        ("constant", {"cooldown_steps": 20}, 99, 0.05),
        ("linear", {}, 25, 0.75),
        ("linear", {"warmup_steps": 20}, 60, 0.5),
        ("linear", {"warmup_steps": 20, "end": 0.2}, 60, 0.6),
        ("linear", {"cooldown_steps": 50}, 75, 0.25 * 0.5),
        ("cosine", {}, 50, 0.5),
        ("cosine", {"warmup_steps": 20}, 10, 0.5),
        ("cosine", {"warmup_steps": 40}, 60, 0.75),
        ("rsqrt", {"timescale_steps": 10}, 30, 0.5),
        ("rsqrt", {"timescale_steps": 10, "shift_steps": 30, "warmup_steps": 8}, 4, 0.25),
        ("rsqrt", {"timescale_steps": 10, "shift_steps": 30, "warmup_steps": 8}, 8, 0.5),
    ],
)
def test_hand_values(type: str, params: dict[str, float], step: int, factor: float) -> None:
    assert build(type, **params)(step) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("type", SCHEDULES)
def test_every_schedule_over_its_whole_length(type: str) -> None:
    """The reference's equations, one by one and at once; 0 at first, above 0 at last, no jump anywhere."""
    total, warmup, cooldown = 400, 50, 80
    own = {"timescale": 30, "shift": 7} if type == "rsqrt" else {"end": 0.1} if type == "linear" else {}
    schedule = build(
        type,
        total,
        warmup_steps=warmup,
        cooldown_steps=cooldown,
        **{f"{name}_steps" if name != "end" else name: value for name, value in own.items()},
    )
    factors = [schedule(k) for k in range(total)]
    expected = [reference(type, k, T=total, W=warmup, K=cooldown, **own) for k in range(total)]
    np.testing.assert_allclose(factors, expected, rtol=1e-13, atol=1e-16)
    np.testing.assert_allclose(schedule.factors(np.arange(total, dtype=np.float64)), factors, rtol=1e-13)
    assert factors[0] == 0
    assert factors[-1] > 0
    assert max(factors) <= 1
    assert np.abs(np.diff(factors)).max() <= 1 / warmup + 1e-12


def test_lengths_in_every_unit() -> None:
    """A batch of 4096 and an epoch of 40,960 images: 10 steps an epoch."""
    steps = build("rsqrt", warmup_steps=10, cooldown_steps=20, timescale_steps=30)
    assert build("rsqrt", warmup_epochs=1, cooldown_percent=20, timescale_images=30 * 4096) == steps
    assert build("constant", warmup_images=1).params.warmup.value == 1, "at least one step, as in the reference"


@pytest.mark.parametrize("type", SCHEDULES)
def test_a_checkpoint_can_keep_it(type: str) -> None:
    schedule = build(type, warmup_percent=7, cooldown_epochs=1.5)
    assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


@pytest.mark.parametrize("cooldown", [0, 50])
@pytest.mark.parametrize("type", ["rsqrt", "constant"])
def test_an_infinite_schedule_forks_from_its_trunk(type: str, cooldown: int) -> None:
    """Cut at another total, the past stays the same up to the earlier of the two cooldowns."""
    trunk = build(type, 1000, warmup_steps=20)
    fork = build(type, 400, warmup_steps=20, cooldown_steps=cooldown)
    assert trunk.first_difference(fork, 350) is None
    assert fork.first_difference(trunk, 350) is None
    assert trunk.first_difference(fork, 400) == (351 if cooldown else None), "(T − k)/K is still 1 at k = 350"


def test_other_schedules_do_not_fork() -> None:
    for type, first in (("linear", 21), ("cosine", 21)):
        assert build(type, 1000, warmup_steps=20).first_difference(build(type, 900, warmup_steps=20), 100) == first
    assert build("rsqrt", warmup_percent=10).first_difference(build("rsqrt", 200, warmup_percent=10), 100) == 1
    assert build("rsqrt").first_difference(build("rsqrt", shift_steps=1), 1) == 0
    assert build("rsqrt").first_difference(build("rsqrt", shift_steps=1), 0) is None


def test_a_million_steps_are_compared_quickly() -> None:
    begin = time.process_time()
    longer = build("rsqrt", 2_000_000, **VIT_G)
    assert build("rsqrt", 1_000_000, **VIT_G).first_difference(longer, 1_000_000) == 950_001
    assert time.process_time() - begin < 2


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"type": "WarmupDecayLR", "params": {"warmup_num_steps": 5}}, ["DeepSpeed", '"linear"', "warmup_steps"]),
        ({"type": "rsqr"}, ["scheduler.type", "'rsqr'", "did you mean 'rsqrt'", "cosine"]),
        (
            {"type": "rsqrt", "params": {"warm_steps": 5}},
            ["scheduler.params.warm_steps", "did you mean 'warmup_steps'"],
        ),
        ({"type": "cosine", "params": {"timescale_steps": 5}}, ["scheduler.params.timescale_steps", "unknown"]),
        ({"type": "rsqrt", "params": {"warmup_steps": 5, "warmup_images": 5}}, ["warmup_steps and warmup_images"]),
        ({"type": "rsqrt", "params": {"timescale_epochs": 0}}, ["timescale_epochs", "more than 0"]),
        ({"type": "linear", "params": {"end": 1.5}}, ["scheduler.params.end", "1.5"]),
        ({"type": "linear", "parms": {}}, ["scheduler.parms", "did you mean 'params'"]),
    ],
)
def test_mistakes_are_named_when_the_section_is_read(section: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        sections.parse(SchedulerSection, section, "scheduler")
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize("params", [{"warmup_steps": 100}, {"warmup_steps": 60, "cooldown_steps": 41}])
def test_lengths_that_do_not_fit(params: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"do not fit into the run's 100 steps"):
        build("rsqrt", **params)
    assert build("rsqrt", 101, **params)(0) == 0
