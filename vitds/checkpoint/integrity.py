"""What is in a directory of checkpoints, and whether all of it is as it was saved. For people; starts no ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitds.checkpoint.files import FileRecord, read_json
from vitds.checkpoint.format import (
    DELETED,
    MANIFEST,
    REPLACED,
    TEMPORARY,
    NewerFormat,
    index_name,
    read_manifest,
    step_of,
)
from vitds.checkpoint.load import Checkpoint
from vitds.checkpoint.tensorfile import read_header
from vitds.checkpoint.whole import TENSORS, check_file, check_sum, check_whole
from vitds.errors import UserError
from vitds.guard import spoiled
from vitds.run_directory import read_skips

_HEADINGS = ("step", "written", "size", "average", "optimizer", "by", "top-1", "")


def is_checkpoint(path: Path) -> bool:
    """One checkpoint's directory, whole or not, rather than a directory of them."""
    return path.is_dir() and (step_of(path.name) is not None or (path / MANIFEST).exists())


def checkpoint_homes(path: Path) -> list[Path]:
    """The `checkpoints/` directories that `path` means: itself, that of a run, or those of the runs in it.

    Raises:
        UserError: nothing of the kind is there.
    """
    if not path.is_dir():
        raise UserError(f"{path}: {'not a directory' if path.exists() else 'no such directory'}")
    if (path / "checkpoints").is_dir():
        return [path / "checkpoints"]
    if path.name == "checkpoints" or any(child.name.startswith("step-") for child in path.iterdir()):
        return [path]
    runs = sorted(child / "checkpoints" for child in path.iterdir() if (child / "checkpoints").is_dir())
    if not runs:
        raise UserError(
            f"{path}: no checkpoints: expected a run, its checkpoints/, one of them (step-…), or a directory of runs"
        )
    return runs


def steps_in(home: Path) -> list[Path]:
    """The directories in a `checkpoints/` that have a checkpoint's name, oldest step first."""
    return sorted((path for path in home.iterdir() if step_of(path.name) is not None), key=lambda p: step_of(p.name))  # type: ignore[arg-type,return-value]


def newest_whole(path: Path) -> Path:
    """The checkpoint that `path` is, or the newest in the run that it is, by the lengths of its files.

    Raises:
        UserError: there is none, or there are several runs.
    """
    if is_checkpoint(path):
        return path
    homes = checkpoint_homes(path)
    if len(homes) > 1:
        raise UserError(f"{path}: holds {len(homes)} runs; name one of them")
    found = next((step for step in reversed(steps_in(homes[0])) if not isinstance(opened(step), UserError)), None)
    if found is None:
        raise UserError(f"{path}: holds no whole checkpoint")
    return found


def opened(path: Path) -> Checkpoint | UserError:
    """A checkpoint that is whole by the lengths of its files, or why it is not."""
    try:
        return Checkpoint(path, check_whole(path))
    except UserError as error:
        return error
    except OSError as error:
        return UserError(f"{path}: cannot be read: {error}")


def listing(home: Path) -> list[str]:
    """A table of one `checkpoints/`: a line for each checkpoint, and for each leftover of a save that did not end.

    Marked is the one that a resume takes if it, too, finds its checksums right.
    """
    skips = []
    if home.name == "checkpoints":
        skips = [(entry["start"], entry["end"]) for entry in read_skips(home.parent / "skips.json")]
    rows: list[tuple[str, ...]] = []
    settled = False
    for path in reversed(steps_in(home)):
        found = opened(path)
        step = f"{step_of(path.name):,}"
        if isinstance(found, UserError):
            reason = str(found).removeprefix(f"{path}/")
            rows.append((step, "", "", "", "", "", "", f"not used: {reason}"))
            settled = settled or isinstance(found, NewerFormat)  # there a resume stops
            continue
        unwanted = spoiled(found.training_state, skips)
        remark = f"not used: {unwanted}" if unwanted else "" if settled else "a resume goes on from here"
        settled = settled or unwanted is None
        rows.append((step, *_facts(found), remark))
    lines = [f"{home}:", *_table([_HEADINGS, *reversed(rows)])] if rows else [f"{home}: no checkpoints"]
    for path in sorted(home.iterdir()):
        if path.name.startswith("step-") and path.name.endswith(TEMPORARY):
            lines.append(f"  {path.name}: {_leftover(path.name)}")
    return lines


def _facts(checkpoint: Checkpoint) -> tuple[str, ...]:
    state: dict[str, Any] = checkpoint.training_state
    size = sum(record.bytes for record in checkpoint.manifest.files.values())
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime((checkpoint.path / MANIFEST).stat().st_mtime))
    top1 = [state["evaluation"].get(name) for name in ("eval/top1", "eval_ema/top1")]
    shown = " / ".join(
        "-" if value is None else f"{value:.4f}" for value in (top1 if top1[1] is not None else top1[:1])
    )
    return (
        written,
        f"{size / 1e9:.3f} GB",
        "yes" if len(checkpoint.kinds) > 2 else "no",
        state["optimizer"]["type"],
        f"ZeRO-{state['zero_stage']} on {state['world_size']}",
        shown,
    )


def _leftover(name: str) -> str:
    if name.endswith(DELETED):
        return "is being deleted, or was when the run ended; the next start removes it"
    if name.endswith(REPLACED):
        return "had stepped aside for a new one of its step; the next start puts it back or removes it"
    return "a save that is under way or did not end; the next start removes it"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


@dataclass(frozen=True)
class Verdict:
    """Of one checkpoint; no problems: every byte is what was saved, and it can be loaded."""

    path: Path
    problems: tuple[str, ...]
    note: str

    def __str__(self) -> str:
        return f"{self.path.name}: {'BAD: ' + '; '.join(self.problems) if self.problems else 'good: ' + self.note}"


def verify(path: Path) -> Iterator[Verdict]:
    """Read every byte of a checkpoint, or of all those in a run or a directory of runs, and judge each.

    Raises:
        UserError: there is nothing to judge.
    """
    steps = [path] if is_checkpoint(path) else [step for home in checkpoint_homes(path) for step in steps_in(home)]
    if not steps:
        raise UserError(f"{path}: no checkpoints")
    for step in steps:
        problems, note = _judge(step)
        yield Verdict(step, tuple(problem.replace(f"{step}/", "") for problem in problems), note)


def _judge(path: Path) -> tuple[list[str], str]:
    try:
        check_file(path / MANIFEST)
        manifest = read_manifest(path)
    except (UserError, OSError) as error:
        return [str(error)], ""
    problems = [problem for name, record in manifest.files.items() if (problem := _wrong_file(path / name, record))]
    found = opened(path)
    if isinstance(found, UserError):
        return problems or [str(found)], ""
    problems += _incomplete(found)
    size = sum(record.bytes for record in manifest.files.values())
    tensors = sum(len(stored) for stored in found.kinds.values())
    return problems, f"{len(manifest.files)} files, {size:,} bytes, {tensors} tensors ({', '.join(found.kinds)})"


def _wrong_file(path: Path, record: FileRecord) -> str | None:
    try:
        check_file(path)
        size = path.stat().st_size
        if size != record.bytes:
            return f"{path}: {size:,} bytes long, the manifest says {record.bytes:,}"
        check_sum(path, record)
        return None
    except FileNotFoundError:
        return f"{path}: missing"
    except (UserError, OSError) as error:
        return str(error)


def _incomplete(checkpoint: Checkpoint) -> list[str]:
    """Where indexes and files do not tell of the same tensors; that each entry is in its file has been checked."""
    problems = []
    told: dict[str, set[str]] = {}
    for kind, tensors in checkpoint.kinds.items():
        for name, stored in tensors.items():
            told.setdefault(stored.path.name, set()).add(name)
        index = checkpoint.path / index_name(kind)
        if index.exists():
            metadata = read_json(index).get("metadata")
            total = metadata.get("total_size") if isinstance(metadata, dict) else None
            size = sum(stored.spec.nbytes for stored in tensors.values())
            if total != size:
                problems.append(f"{index}: metadata.total_size: {total}, its tensors have {size} bytes")
    for name in checkpoint.manifest.files:
        if name.endswith(TENSORS):
            held = read_header(checkpoint.path / name)
            missing = [tensor for tensor in held if tensor not in told.get(name, set())]
            if missing or name not in told:
                named = f"its tensor {missing[0]!r}" if missing else "it"
                problems.append(f"{checkpoint.path / name}: no index names {named}")
    return problems
