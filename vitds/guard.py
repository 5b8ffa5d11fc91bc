"""What happens to a batch whose loss or gradient is not finite; the weights never see it either way."""

from __future__ import annotations

import math
from typing import Protocol

from vitds.errors import Stopped


class Place(Protocol):
    """Where a run is (vitds.checkpoint.state.Progress)."""

    step: int
    position: int


class NotFinite(Stopped):
    """A loss or gradient was inf or nan, and the run stops before the update."""


class Guard:
    """Counts batches dropped in a row and says when to stop.

    Args:
        policy: stop or skip.
        max_skips: batches in a row that may be dropped.
        scaled: fp16 with a loss scale, where overflowing gradients are how the scale is found and never stop a run
            before `max_skips`.
    """

    def __init__(self, policy: str, max_skips: int, scaled: bool) -> None:
        self.policy, self.max_skips, self.scaled = policy, max_skips, scaled
        self.in_a_row = 0

    def check_loss(self, loss: float, at: Place) -> None:
        """Before the update: the mean loss over all ranks, hence the same answer on each.

        Raises:
            NotFinite: the loss is inf or nan and the policy is to stop.
        """
        if not math.isfinite(loss) and self.policy == "stop":
            raise NotFinite(
                f"step {at.step}, images from position {at.position}: the loss is {loss}; the weights are those of step {at.step}"
            )

    def check_update(self, updated: bool, gradient_norm: float, at: Place) -> None:
        """After the update, or after DeepSpeed refused to make it because a gradient was not finite.

        Raises:
            NotFinite: the policy is to stop, or too many batches in a row were dropped.
        """
        self.in_a_row = 0 if updated else self.in_a_row + 1
        if updated or (self.scaled and self.in_a_row <= self.max_skips):
            return
        if self.policy == "stop" or self.in_a_row > self.max_skips:
            raise NotFinite(
                f"step {at.step}, images from position {at.position}: the gradient's norm is {gradient_norm}, {self.in_a_row} time(s) in a "
                f"row; the weights are those of step {at.step}"
            )
