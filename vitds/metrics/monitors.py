"""TensorBoard, Weights & Biases and CSV: DeepSpeed's sections, our writers.

DeepSpeed's own writers know scalars only and count samples from 0 again after a resume that is not its own. Here the x
axis is the step: the number of updates made. All three are optional and imported only when they are enabled.
"""

from __future__ import annotations

import csv
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from vitds import sections
from vitds.errors import UserError
from vitds.sections import key


@dataclass(frozen=True)
class TensorBoardSection:
    """The run file's `tensorboard`, in DeepSpeed's words."""

    enabled: bool = key(False, "Write TensorBoard events.")
    output_path: str = key("", "Directory of the events; empty: <output-dir>/tensorboard.")
    job_name: str = key("", "A directory below output_path.")


@dataclass(frozen=True)
class WandbSection:
    """The run file's `wandb`, in DeepSpeed's words. Modes and keys are wandb's: WANDB_MODE=offline, `wandb login`."""

    enabled: bool = key(False, "Log to Weights & Biases; needs its package.")
    group: str | None = key(None, "Group the run belongs to.")
    team: str | None = key(None, "Team (entity) that owns the project.")
    project: str = key("vitds", "Project the run appears in.")


@dataclass(frozen=True)
class CsvSection:
    """The run file's `csv_monitor`, in DeepSpeed's words."""

    enabled: bool = key(False, "Write one CSV file per metric.")
    output_path: str = key("", "Directory of the files; empty: <output-dir>/csv.")
    job_name: str = key("", "A directory below output_path.")


@dataclass(frozen=True)
class MonitorSections:
    """The three monitors of a run file."""

    tensorboard: TensorBoardSection = key(TensorBoardSection(), "TensorBoard.")
    wandb: WandbSection = key(WandbSection(), "Weights & Biases.")
    csv_monitor: CsvSection = key(CsvSection(), "CSV files.")


def monitor_sections(run_file: dict[str, Any]) -> MonitorSections:
    """The monitors from the top level of a run file, whose other keys are not looked at.

    Raises:
        UserError: unknown key or wrong type in one of them.
    """
    return MonitorSections(
        tensorboard=sections.parse(TensorBoardSection, run_file.get("tensorboard", {}), "tensorboard"),
        wandb=sections.parse(WandbSection, run_file.get("wandb", {}), "wandb"),
        csv_monitor=sections.parse(CsvSection, run_file.get("csv_monitor", {}), "csv_monitor"),
    )


class Monitor(Protocol):
    """What the recorder asks of a monitor."""

    def scalars(self, step: int, row: dict[str, float]) -> None:
        """Metrics after `step` updates; may be called several times for a step."""

    def text(self, name: str, text: str, step: int) -> None:
        """A Markdown text."""

    def pictures(self, name: str, images: torch.Tensor, step: int) -> None:
        """Images (B, 3, S, S) uint8, shown as one picture."""

    def close(self) -> None:
        """Everything written is on disk afterwards."""


class TensorBoard:
    """Events in a directory of their own; those of a life of the run that died past the resume step are purged."""

    def __init__(self, directory: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"tensorboard.enabled: the package cannot be imported ({error}); pip install tensorboard"
            ) from error
        # TensorBoard drops what earlier files hold at this step and after it.
        self._writer = SummaryWriter(str(directory), purge_step=first_step + 1)

    def scalars(self, step: int, row: dict[str, float]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a killed run keeps its curves

    def text(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, text, step)

    def pictures(self, name: str, images: torch.Tensor, step: int) -> None:
        self._writer.add_images(name, images, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Csv:
    """One file per metric, "train_loss.csv", of rows step, value. After a resume the last row of a step counts."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory

    def scalars(self, step: int, row: dict[str, float]) -> None:
        for name, value in row.items():
            path = self._directory / f"{name.replace('/', '_')}.csv"
            with open(path, "a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                if not file.tell():
                    writer.writerow(["step", name])
                writer.writerow([step, value])

    def text(self, name: str, text: str, step: int) -> None:
        """A table has no place for it."""

    def pictures(self, name: str, images: torch.Tensor, step: int) -> None:
        """A table has no place for them."""

    def close(self) -> None:
        """Every row was closed when it was written."""


class Wandb:
    """A run of Weights & Biases, continued by every later start in the same directory."""

    def __init__(self, section: WandbSection, directory: Path, run_file: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(f"wandb.enabled: the package cannot be imported ({error}); pip install wandb") from error
        (directory / "wandb").mkdir(exist_ok=True)
        name = directory / "wandb" / "vitds-run-id"
        if not name.exists():
            name.write_text(uuid.uuid4().hex)
        self._wandb = wandb
        self._run = wandb.init(
            dir=str(directory),
            id=name.read_text().strip(),
            resume="allow",
            name=directory.resolve().name,
            project=section.project,
            entity=section.team,
            group=section.group,
            config=run_file,
        )
        # wandb's own step only counts up; after a resume ours may go back.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, row: dict[str, float]) -> None:
        self._run.log({"step": step, **row})

    def text(self, name: str, text: str, step: int) -> None:
        """The run file is the run's config there."""

    def pictures(self, name: str, images: torch.Tensor, step: int) -> None:
        pictures = [self._wandb.Image(image.permute(1, 2, 0).numpy()) for image in images]
        self._run.log({"step": step, name: pictures})

    def close(self) -> None:
        self._run.finish()


def tensorboard_directory(section: TensorBoardSection, run: Path) -> Path:
    """Where the events lie."""
    return Path(section.output_path or run / "tensorboard") / section.job_name


def open_monitors(monitors: MonitorSections, run: Path, first_step: int, run_file: dict[str, Any]) -> list[Monitor]:
    """The writers that are enabled.

    Raises:
        UserError: one of them needs a package that is not installed, or cannot write where it should.
    """
    opened: list[Monitor] = []
    try:
        if monitors.tensorboard.enabled:
            opened.append(TensorBoard(tensorboard_directory(monitors.tensorboard, run), first_step))
        if monitors.wandb.enabled:
            opened.append(Wandb(monitors.wandb, run, run_file))
        if monitors.csv_monitor.enabled:
            opened.append(Csv(Path(monitors.csv_monitor.output_path or run / "csv") / monitors.csv_monitor.job_name))
    except OSError as error:
        raise UserError(f"a monitor cannot write to {error.filename}: {error.strerror}; see its output_path") from error
    return opened
