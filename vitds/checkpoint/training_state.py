"""training_state.json: what a checkpoint holds besides tensors, and the proof that a resume can use it.

Written by `vitds.checkpoint.state`. Every key is needed; others are left alone.
"""

from __future__ import annotations

from typing import Any

from vitds.errors import UserError, one_of
from vitds.schedules import SCHEDULES, Schedule
from vitds.sections import typed

KEYS: dict[str, Any] = {
    "step": int,
    "position": int,
    "images_seen": int,
    "skipped": list[list[int]],
    "evaluated": int,
    "losses": list[float],
    "stream.seed": int,
    "stream.global_batch": int,
    "stream.rates": dict[str, list[Any]],
    "schedule.type": str,
    "schedule.total_steps": int,
    "schedule.params": dict[str, Any],
    "optimizer.type": str,
    "counters.optimizer": dict[str, Any],
    "counters.loss_scale": dict[str, float],
    "evaluation": dict[str, float | None],
    "world_size": int,
    "zero_stage": int,
    "versions": dict[str, str],
}
"""Dotted key -> type of its value."""
LEAST = {"stream.global_batch": 1, "schedule.total_steps": 1, "world_size": 1}
"""Least value where it is not 0; the seed alone may be anything."""


def check_training_state(state: dict[str, Any], step: int, where: str) -> None:
    """Every key is there, of its type and in its range.

    Args:
        state: the file's object.
        step: of the checkpoint, as its manifest says.
        where: names the file in errors.

    Raises:
        UserError: naming the key, what it is and what it should be.
    """
    try:
        found = {dotted: typed(_at(state, dotted, where), hint, f"{where}: {dotted}") for dotted, hint in KEYS.items()}
    except OverflowError:
        raise UserError(f"{where}: a number that is too large") from None
    for dotted, value in found.items():
        if KEYS[dotted] is int and dotted != "stream.seed" and not LEAST.get(dotted, 0) <= value < 2**63:
            raise UserError(f"{where}: {dotted}: expected at least {LEAST.get(dotted, 0)}, found {value}")
    if state["step"] != step:
        raise UserError(f"{where}: step: {state['step']}, in a checkpoint of step {step}")
    if state["zero_stage"] > 3:
        raise UserError(f"{where}: zero_stage: expected 0 to 3, found {state['zero_stage']}")
    for i, pair in enumerate(state["skipped"]):
        if len(pair) != 2 or not 0 <= pair[0] < pair[1]:
            raise UserError(f"{where}: skipped[{i}]: expected [start, end) of positions, found {pair}")
    for name, rate in state["stream"]["rates"].items():
        typed(rate[:2], list[float], f"{where}: stream.rates.{name}")
        if len(rate) != 3 or type(rate[2]) is not bool:
            raise UserError(f"{where}: stream.rates.{name}: expected [rate, decay, frozen], found {rate}")
    _check_counters(state["counters"]["optimizer"], f"{where}: counters.optimizer")


def check_schedule(state: dict[str, Any], where: str) -> None:
    """This program knows the schedule of a checked training state; one from a plugin it knows after importing that.

    Raises:
        UserError: unknown type, unknown or malformed parameters.
    """
    if state["schedule"]["type"] not in SCHEDULES:
        raise UserError(one_of(f"{where}: schedule.type", state["schedule"]["type"], SCHEDULES))
    try:
        Schedule.from_json(state["schedule"])
    except (UserError, OverflowError) as error:
        raise UserError(f"{where}: schedule: {error}") from None


def _check_counters(counters: dict[str, Any], where: str) -> None:
    """Of an optimizer of ours the number of updates; of another the scalars of its state and of its groups."""
    if "updates" in counters:
        if type(counters["updates"]) is not int or counters["updates"] < 0:
            raise UserError(f"{where}.updates: expected a whole number ≥ 0, found {counters['updates']!r}")
        return
    for key in ("state", "group"):
        typed(_at(counters, key, where), dict[str, float], f"{where}.{key}")


def _at(value: Any, dotted: str, where: str) -> Any:
    """The value at a dotted key."""
    for word in dotted.split("."):
        if not isinstance(value, dict) or word not in value:
            raise UserError(f"{where}: {dotted}: missing")
        value = value[word]
    return value
