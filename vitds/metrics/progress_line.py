"""The line a person watches."""

from __future__ import annotations

import datetime
import re
import sys
from typing import TextIO


class ProgressLine:
    """One line per logged step; a terminal shows only the newest.

    Args:
        total_steps: of the whole run.
        global_batch: images per step; with the speed it gives the time left.
    """

    def __init__(self, total_steps: int, global_batch: int, stream: TextIO | None = None) -> None:
        self._total_steps = total_steps
        self._global_batch = global_batch
        self._stream = stream or sys.stdout
        self._rewrites = self._stream.isatty()
        self._open = False

    def show(self, step: int, row: dict[str, float]) -> None:
        """What `row` holds of loss, learning rate, speed and gradient norm after `step` updates; other metrics of
        evaluations get a line that stays, but for those of single seeds."""
        measured = {
            name: value
            for name, value in row.items()
            if not name.startswith(("train/", "perf/", "cluster/", "data/")) and not re.search(r"_seed\d+$", name)
        }
        if "train/loss" in row:
            line = self.line(step, row)
            self._write(f"\r\x1b[K{line}" if self._rewrites else f"{line}\n")
            self._open = self._rewrites
        if measured:
            self.say(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in measured.items()))

    def line(self, step: int, row: dict[str, float]) -> str:
        """The text of one step, without an end of line."""
        done = min(1.0, step / self._total_steps)
        parts = [f"step {step:>{len(str(self._total_steps))}}/{self._total_steps} {done:4.0%}"]
        parts.append(f"loss {row['train/loss']:.4f}")
        if "train/lr" in row:
            parts.append(f"lr {row['train/lr']:.2e}")
        if "train/grad_norm" in row:
            parts.append(f"grad norm {row['train/grad_norm']:.3g}")
        speed = row.get("perf/images_per_second")
        if speed:
            left = round((self._total_steps - step) * self._global_batch / speed)
            parts.append(f"{speed:,.0f} images/s" if speed >= 100 else f"{speed:.3g} images/s")
            parts.append(f"ETA {datetime.timedelta(seconds=max(0, left))}")
        return "  ".join(parts)

    def say(self, text: str) -> None:
        """A line that stays, under the progress line if one is open."""
        self.close()
        self._write(f"{text}\n")

    def close(self) -> None:
        """End the open line, so that what is printed next starts on its own."""
        if self._open:
            self._write("\n")
            self._open = False

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
