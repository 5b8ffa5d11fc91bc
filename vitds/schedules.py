"""The learning rate as a pure function of the step: rate = base rate × schedule(step).

The equations are those of the reference implementation of "Scaling Vision Transformers" (arXiv 2106.04560 §3.5 and
appendix B; `create_learning_rate_schedule` in big_vision/utils.py). With step k, warmup W, cooldown K, total T:

    schedule(k) = base(k) · min(1, k/W) · min(1, (T − k)/K)          a factor with W or K = 0 is left out

The first update uses k = 0, the last k = T − 1. There is no state: what a checkpoint stores of a schedule (`to_json`)
serves only to refuse a fork whose past steps would have had another rate (`first_difference`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitds import sections
from vitds.errors import UserError, one_of
from vitds.sections import Duration, key

# Instead of DeepSpeed's schedulers, which count batches, cannot be evaluated at a step and keep state of their own.
_INSTEAD_OF_DEEPSPEEDS = {
    "WarmupLR": '{"type": "constant", "params": {"warmup_steps": …}}',
    "WarmupDecayLR": '{"type": "linear", "params": {"warmup_steps": …}}',
    "WarmupCosineLR": '{"type": "cosine", "params": {"warmup_steps": …}}',
    "OneCycle": '{"type": "linear", "params": {"warmup_percent": …}}',
    "LRRangeTest": '{"type": "constant"}, one short run per rate',
}


@dataclass(frozen=True)
class Constant:
    """1 between warmup and cooldown: base(k) = 1. The other schedules share its two lengths."""

    warmup: Duration = key(Duration(0), "Length of the linear rise from 0.")
    cooldown: Duration = key(Duration(0), "Length of the linear fall toward 0 at the end; it multiplies the schedule.")

    def base(self, k: Any, total: int) -> Any:
        """The factor before warmup and cooldown.

        Args:
            k: steps in float64, a number or an array of any shape, as is the result.
            total: the run's steps. The lengths in `self` have been turned into steps before.
        """
        return np.ones_like(k)

    def progress(self, k: Any, total: int) -> Any:
        """p: the share of the steps after the warmup that lies behind, 0 to 1."""
        return np.clip((k - self.warmup.value) / (total - self.warmup.value), 0, 1)


@dataclass(frozen=True)
class Cosine(Constant):
    """From 1 to 0 in half a cosine: base(k) = ½(1 + cos πp), p = clip((k − W)/(T − W), 0, 1)."""

    def base(self, k: Any, total: int) -> Any:
        return 0.5 * (1 + np.cos(np.pi * self.progress(k, total)))


@dataclass(frozen=True)
class Linear(Constant):
    """From 1 to `end` in a straight line: base(k) = end + (1 − end)(1 − p), p = clip((k − W)/(T − W), 0, 1)."""

    end: float = key(0.0, "Factor reached after the last step, before the cooldown's.")

    def __post_init__(self) -> None:
        if not 0 <= self.end <= 1:
            raise UserError(f"scheduler.params.end: expected a factor from 0 to 1, found {self.end}")

    def base(self, k: Any, total: int) -> Any:
        return self.end + (1 - self.end) * (1 - self.progress(k, total))


@dataclass(frozen=True)
class Rsqrt(Constant):
    """Inverse square root, with no end of its own: base(k) = 1/√(1 + (max(k, W) + shift − W)/timescale).

    With timescale = W and no shift this is the classic √(W/k). Only the cooldown depends on the total, so that runs of
    several lengths can be cut from one trunk.
    """

    timescale: Duration = key(Duration(10_000), "Steps after which the rate has fallen to 1/√2.")
    shift: Duration = key(
        Duration(0), "Steps the curve is moved on by, to go on smoothly after a change of batch size."
    )

    def __post_init__(self) -> None:
        if self.timescale.value == 0:
            raise UserError(f"scheduler.params.timescale_{self.timescale.unit}: expected more than 0")

    def base(self, k: Any, total: int) -> Any:
        warmup = self.warmup.value
        return 1 / np.sqrt(1 + (np.maximum(k, warmup) + self.shift.value - warmup) / self.timescale.value)


SCHEDULES: dict[str, type[Constant]] = {"rsqrt": Rsqrt, "constant": Constant, "linear": Linear, "cosine": Cosine}
"""Name in the run file -> dataclass of its parameters, with the pure function `base`."""


@dataclass(frozen=True)
class SchedulerSection:
    """The run file's `scheduler`, in DeepSpeed's form."""

    type: str = key("constant", "Name of the schedule: rsqrt, constant, linear, cosine, or one added to SCHEDULES.")
    params: dict[str, Any] = key(
        {}, "Its parameters; lengths as *_steps, *_images, *_epochs or *_percent of the total."
    )

    def __post_init__(self) -> None:
        if self.type in _INSTEAD_OF_DEEPSPEEDS and self.type not in SCHEDULES:
            raise UserError(
                f"scheduler.type: {self.type!r} is DeepSpeed's own and not run by vitds, whose schedules are functions "
                f"of the step; write {_INSTEAD_OF_DEEPSPEEDS[self.type]}"
            )
        if self.type not in SCHEDULES:
            raise UserError(one_of("scheduler.type", self.type, SCHEDULES))
        sections.parse(SCHEDULES[self.type], self.params, "scheduler.params")


@dataclass(frozen=True)
class Schedule:
    """A schedule with all lengths in optimizer steps; `schedule(step)` is the factor on the base learning rate."""

    type: str
    total_steps: int
    params: Constant
    """The parameters, every length in steps."""

    def __call__(self, step: int) -> float:
        """The factor of update number `step`, counted from 0: the first update after a warmup start has factor 0."""
        assert step >= 0, step
        return float(self.factors(np.float64(step)))

    def factors(self, steps: Any) -> Any:
        """The factors of many steps at once: float64 in, float64 out, any shape."""
        factors = self.params.base(steps, self.total_steps)
        warmup, cooldown = self.params.warmup.value, self.params.cooldown.value
        if warmup:
            factors = factors * np.minimum(1, steps / warmup)
        if cooldown:
            factors = factors * np.clip((self.total_steps - steps) / cooldown, 0, 1)
        return factors

    def to_json(self) -> dict[str, Any]:
        """In the run file's form, every length in steps; `from_json` gives an equal schedule."""
        return {"type": self.type, "total_steps": self.total_steps, "params": sections.to_json(self.params)}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Schedule:
        """The schedule that `to_json` wrote.

        Raises:
            UserError: a type or parameter that this installation does not know.
        """
        section = {"type": stored["type"], "params": stored["params"]}
        return build_schedule(section, total_steps=stored["total_steps"], global_batch=1)

    def first_difference(self, other: Schedule, steps: int) -> int | None:
        """The first of the steps 0 … `steps` − 1 at which the two give different factors, or None."""
        if self == other:
            return None
        at_once = 1 << 16
        for start in range(0, steps, at_once):
            k = np.arange(start, min(start + at_once, steps), dtype=np.float64)
            differing = np.flatnonzero(self.factors(k) != other.factors(k))
            if differing.size:
                return start + int(differing[0])
        return None


def build_schedule(
    section: SchedulerSection | dict[str, Any],
    *,
    total_steps: int,
    global_batch: int,
    images_per_epoch: int | None = None,
) -> Schedule:
    """The schedule of a run, from its section.

    Args:
        section: the run file's `scheduler`, parsed or as JSON.
        total_steps: optimizer steps of the whole run.
        global_batch: images per step; turns `*_images` and `*_epochs` into steps.
        images_per_epoch: images in the training set, if it has a size; needed for `*_epochs`.

    Raises:
        UserError: unknown type or parameter, a length that cannot be turned into steps, warmup and cooldown that do not
            fit into the total, a timescale of 0, an end that is not in [0, 1].
    """
    if total_steps < 1:
        raise UserError(f"the run's total is {total_steps} steps; it must be at least 1")
    if isinstance(section, dict):
        section = sections.parse(SchedulerSection, section, "scheduler")
    params = sections.parse(SCHEDULES[section.type], section.params, "scheduler.params")
    in_steps: dict[str, Duration] = {}
    for field in dataclasses.fields(params):
        length = getattr(params, field.name)
        if isinstance(length, Duration):
            steps = length.to_steps(
                global_batch=global_batch, images_per_epoch=images_per_epoch, total_steps=total_steps
            )
            in_steps[field.name] = Duration(steps)
    params = dataclasses.replace(params, **in_steps)
    warmup, cooldown = params.warmup.value, params.cooldown.value
    if warmup >= total_steps or warmup + cooldown > total_steps:
        raise UserError(
            f"scheduler.params: a warmup of {warmup} and a cooldown of {cooldown} steps do not fit into the run's "
            f"{total_steps} steps; shorten them, or train longer"
        )
    return Schedule(section.type, total_steps, params)
