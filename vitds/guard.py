"""What becomes of a batch whose loss or gradient is not finite, and of one whose loss leaps; the weights never see it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from vitds.errors import Stopped
from vitds.sections import check_least, key

RELATIVE_FLOOR = 1e-3
"""Least spread of a window, as a part of its median: a loss that hardly moves is not a reason to see spikes."""


@dataclass(frozen=True)
class GuardSection:
    """What happens when a loss or gradient is not finite, or the loss leaps. The weights never see it."""

    nonfinite: str = key(
        "stop",
        "stop ends the run before the update; skip drops a batch whose loss or gradient is not finite.",
        choices=("stop", "skip"),
    )
    max_skips: int = key(10, "Batches dropped in a row before the run stops all the same.")
    spike: str = key(
        "off",
        "When a batch's loss leaps: stop ends the run before the update; rollback goes back to the last good checkpoint "
        "and leaves the offending batches out.",
        choices=("off", "stop", "rollback"),
    )
    spike_window: int = key(128, "Number of last losses against which one is judged; from half of them on.")
    spike_threshold: float = key(10.0, "Robust standard deviations above their median that make a spike.")
    spike_batches: int = key(8, "Batches that a rollback leaves out, the one with the spike being the last.")
    max_rollbacks: int = key(3, "Rollbacks of the whole run before it stops all the same.")

    def __post_init__(self) -> None:
        least = {"max_skips": 0, "spike_window": 8, "spike_threshold": 1, "spike_batches": 1, "max_rollbacks": 0}
        check_least("vitds.guard", self, **least)


class Place(Protocol):
    """Where a run is (vitds.checkpoint.progress.Progress)."""

    step: int
    position: int


class NotFinite(Stopped):
    """A loss or gradient was inf or nan, and the run stops before the update."""


class Spike(Stopped):
    """The loss leapt, and the run stops before the update."""


Verdict = Literal["update", "drop", "spike"]


class Guard:
    """Judges every batch before and after the update that it asks for.

    All that it is told is the same on every rank, and so are its answers.

    Args:
        section: the run file's `vitds.guard`.
        scaled: fp16 with a loss scale, where overflowing gradients are how the scale is found and never stop a run
            before `max_skips`.
        losses: the last losses of the run that this one goes on from; the list itself is kept up to date.
        rollbacks: made before this start.
    """

    def __init__(self, section: GuardSection, scaled: bool, losses: list[float], rollbacks: int = 0) -> None:
        self.section, self.scaled, self.rollbacks = section, scaled, rollbacks
        self.losses = losses
        """The last losses whose batches made an update."""
        del losses[: -section.spike_window]
        self.in_a_row = 0

    def judge(self, loss: float) -> Verdict:
        """Before the update, of the mean loss over all ranks: what is to become of the batch."""
        if not math.isfinite(loss):
            return "drop"
        leaps = self.section.spike != "off" and self.deviation(loss) > self.section.spike_threshold
        return "spike" if leaps else "update"

    def deviation(self, loss: float) -> float:
        """Robust standard deviations of a loss above the last ones; 0 while there are too few of them.

        1.4826 times the median absolute deviation is the standard deviation of a normal distribution, and unlike it
        is not moved by earlier spikes.
        """
        if 2 * len(self.losses) < self.section.spike_window:
            return 0.0
        median = statistics.median(self.losses)
        spread = 1.4826 * statistics.median(abs(earlier - median) for earlier in self.losses)
        return (loss - median) / (spread + RELATIVE_FLOOR * abs(median) + 1e-12)

    def check_spike(self, loss: float, at: Place) -> None:
        """After the verdict "spike": a rollback is due when this returns.

        Raises:
            Spike: the policy is to stop, or the run has been rolled back too often.
        """
        often = self.rollbacks >= self.section.max_rollbacks
        if self.section.spike == "rollback" and not often:
            return
        why = (
            f", and the run was rolled back {self.rollbacks} time(s) before" if self.section.spike == "rollback" else ""
        )
        raise Spike(
            f"step {at.step}, images from position {at.position}: the loss is {loss:.6g}, {self.deviation(loss):.1f} robust "
            f"standard deviations above the last {len(self.losses)}{why}; the weights are those of step {at.step}"
        )

    def reach(self, at: Any, global_batch: int) -> int | None:
        """Position from which on a rollback from here would give batches up (Progress.last_batches); None: there are no
        rollbacks."""
        return (
            at.last_batches(self.section.spike_batches, global_batch)[0] if self.section.spike == "rollback" else None
        )

    def check_update(
        self, updated: bool, loss: float, gradient_norm: float, at: Place, examine: Callable[[], str]
    ) -> None:
        """After the update, or after it was not made because the loss or a gradient was not finite.

        Args:
            updated: whether it was made.
            loss: mean over all ranks.
            gradient_norm: of the batch.
            at: where the run was before.
            examine: finds out where the first bad number comes from and says it; called at most once, on all ranks.

        Raises:
            NotFinite: the policy is to stop, or too many batches in a row were dropped.
        """
        if updated:
            self.in_a_row = 0
            self.losses.append(loss)
            del self.losses[: -self.section.spike_window]
            return
        self.in_a_row += 1
        overflow = self.scaled and math.isfinite(loss)
        stops = self.in_a_row > self.section.max_skips or (self.section.nonfinite == "stop" and not overflow)
        if overflow and not stops:
            return
        found = examine()
        if stops:
            raise NotFinite(
                f"step {at.step}, images from position {at.position}: the loss is {loss}, the gradient's norm {gradient_norm}, "
                f"{self.in_a_row} time(s) in a row; {found}; the weights are those of step {at.step}"
            )


def spoiled(training_state: dict[str, Any], skips: Sequence[Sequence[int]]) -> str | None:
    """Why a checkpoint is of no use to a run that has given up the ranges `skips`: it learnt from one of them.

    Args:
        training_state: of the checkpoint: `position` and its own `skipped`.
        skips: [start, end) of positions.
    """
    own = sorted(map(tuple, training_state["skipped"]))
    for start, end in skips:
        first = start  # of the range, what the checkpoint did not skip as well
        for low, high in own:
            if low <= first < high:
                first = high
        if first < min(end, training_state["position"]):
            return f"it learnt from positions {start} to {end}, which were given up after a spike of the loss"
    return None
