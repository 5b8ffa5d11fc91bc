"""One row per logged step: to metrics.jsonl, the console and the monitors."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

from vitds import dist
from vitds.json_files import Expendable, append_row
from vitds.lease import Place
from vitds.metrics.monitors import Monitor, MonitorSections, open_monitors, tensorboard_directory
from vitds.metrics.progress_line import ProgressLine

MAX_PICTURES = 64


class Recorder:
    """Where numbers go. On ranks other than 0 every method does nothing.

    A step is the number of updates made: the first row is step 1, the last total_steps.

    Args:
        run_directory: where metrics.jsonl lies.
        monitors: the run file's.
        total_steps: of the whole run.
        global_batch: images per step.
        first_step: updates made before this start; what an earlier life of the run logged past it no longer counts.
        run_file: the resolved run file, shown in the monitors.
        stream: of the console; default standard output.

    Raises:
        UserError: a monitor that is enabled cannot be opened.
    """

    def __init__(
        self,
        run_directory: str | os.PathLike[str],
        monitors: MonitorSections,
        total_steps: int,
        global_batch: int,
        first_step: int = 0,
        run_file: dict[str, Any] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._monitors: list[tuple[Monitor, Expendable]] = []
        self._is_main = dist.is_main()
        self._first_step, self._shown = first_step, False
        if not self._is_main:
            return
        path = Path(run_directory)
        self._rows, self._place = path / "metrics.jsonl", Place(path)
        self._writing, self._speaking = Expendable(self._rows), Expendable("the console")
        self._progress = ProgressLine(total_steps, global_batch, stream)
        opened = open_monitors(monitors, path, first_step, run_file or {})
        self._monitors = [(monitor, Expendable(type(monitor).__name__)) for monitor in opened]
        if run_file is not None:
            text = json.dumps(run_file, indent=2, ensure_ascii=False)
            self._show(lambda monitor: monitor.text("run_file", "    " + text.replace("\n", "\n    "), first_step))

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log what is known after `step` updates: {metric: number or tensor of one element}.

        A step may have several rows, and after a resume be logged again; of each metric the last value counts
        (`read_metrics`). A number that is not finite is null in metrics.jsonl. Where there is no room for a row the run
        goes on without it, and says so once.
        """
        if not self._is_main:
            return
        row = {name: float(value) for name, value in metrics.items()}
        with self._writing:
            self._place.check()
            append_row(self._rows, {"step": step, **row})
        with self._speaking:
            self._progress.show(step, row)
        self._show(lambda monitor: monitor.scalars(step, row))

    def first_batch(self, images: torch.Tensor) -> None:
        """Show the first augmented batch that is given: (B, 3, S, S), uint8, or floating point in [−1, 1]."""
        if not self._monitors or self._shown:
            return
        self._shown = True
        images = images[:MAX_PICTURES].detach().cpu()
        if images.is_floating_point():
            images = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        self._show(lambda monitor: monitor.pictures("first_batch", images, self._first_step))

    def say(self, text: str) -> None:
        """Print a line that the progress line does not overwrite."""
        if self._is_main:
            with self._speaking:
                self._progress.say(text)

    def close(self) -> None:
        """Everything recorded is on disk afterwards, if there is room for it."""
        if not self._is_main:
            return
        with self._speaking:
            self._progress.close()
        self._show(lambda monitor: monitor.close())

    def _show(self, action: Callable[[Monitor], None]) -> None:
        """Something for every monitor; one that the disk refuses does not keep it from the others."""
        for monitor, showing in self._monitors:
            with showing:
                action(monitor)


def read_metrics(run_directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """metrics.jsonl as one row per step, in order of steps: of each metric its last value; torn lines are left out."""
    rows: dict[int, dict[str, Any]] = {}
    for line in (Path(run_directory) / "metrics.jsonl").read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows.setdefault(row["step"], {}).update(row)
    return [rows[step] for step in sorted(rows)]


def closing_lines(run_directory: str | os.PathLike[str], monitors: MonitorSections) -> str:
    """What is printed at the end: where everything lies, and the commands to look at it."""
    run = Path(run_directory)
    lines = [f"metrics      {run / 'metrics.jsonl'}", f"             tail -n 1 {run / 'metrics.jsonl'}"]
    if monitors.tensorboard.enabled:
        events = tensorboard_directory(monitors.tensorboard, run)
        lines += [f"tensorboard  {events}", f"             {_command('tensorboard')} --logdir {events}"]
    steps: list[Path] = []
    with contextlib.suppress(OSError):  # the run is complete, whatever has become of its disk
        steps = sorted(path.parent for path in (run / "checkpoints").glob("step-*/manifest.json"))
    if steps:
        load = f"AutoModelForImageClassification.from_pretrained('{steps[-1]}')"
        lines += [
            f"checkpoints  {run / 'checkpoints'}, the newest {steps[-1].name}",
            f'             {_command("python")} -c "import vitds; from transformers import '
            f'AutoModelForImageClassification; print({load})"',
        ]
    return "\n".join(lines)


def _command(name: str) -> str:
    """A program of this environment as it can be called from here: by its name, or by its path when PATH has another."""
    path = Path(sys.executable).with_name(name)
    if shutil.which(name) == str(path):
        return name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
