"""How often to save, what to keep, and what dead saves leave behind."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitds import dist
from vitds.checkpoint.files import read_json
from vitds.checkpoint.format import DELETED, REPLACED, TEMPORARY, TRAINING_STATE, check_directory, step_of
from vitds.checkpoint.training_state import check_training_state
from vitds.errors import UserError
from vitds.guard import spoiled
from vitds.sections import Duration, key

_LEFTOVER = re.compile(rf"(step-\d{{9,18}})({'|'.join(map(re.escape, (DELETED, REPLACED, TEMPORARY)))})")
_PROBE = re.compile(rf"bandwidth-\d+{re.escape(TEMPORARY)}")
"""What `write_bandwidth` writes."""

_deletions: list[threading.Thread] = []
"""Deletions that are under way: large directories take seconds, which no step should wait for."""


@dataclass(frozen=True)
class CheckpointSection:
    """Section `vitds.checkpoint` of the run file."""

    every: Duration = key(
        Duration(1000), "Length of training between two checkpoints; 0: only when the run ends or is preempted."
    )
    keep_last: int = key(2, "How many of the newest checkpoints are kept.")
    keep_every_steps: int | None = key(
        None, "Checkpoints at multiples of this step are kept for good; unset: none are."
    )
    verify: str = key(
        "full",
        "What a resume checks of the files with tensors: their SHA-256, or only their lengths; all others are always hashed.",
        choices=("full", "size"),
    )
    background: bool = key(
        True, "Copy the state to host memory and write it while training goes on; false: the steps wait for the disk."
    )
    bucket_mib: int = key(512, "Device memory that a save may use, in MiB.")
    on_error: str = key(
        "continue",
        "What a save that fails does to the run: it goes on with the checkpoints it has, or it stops. The last save of a run must succeed.",
        choices=("continue", "stop"),
    )

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_every_steps", "bucket_mib"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"vitds.checkpoint.{name}: expected a whole number ≥ 1, found {value}")


def prune(
    directory: Path,
    keep_last: int,
    keep_every_steps: int | None,
    newest: Path | None = None,
    skips: Sequence[Sequence[int]] = (),
    safe: int | None = None,
) -> list[Path]:
    """Delete the checkpoints that the policy does not keep, and return them. Acts on rank 0, after a save.

    They lose their names here and their files in a thread, see `finish_deletions`. What cannot be deleted stays.
    Only whole checkpoints (by their files' lengths) count and are deleted; what is damaged stays for its owner to
    look at. One always remains.

    Args:
        directory: the run's `checkpoints/`.
        keep_last: how many of the newest to keep, at least 1.
        keep_every_steps: keep multiples of it, too.
        newest: the checkpoint just saved. Those of later steps belong to a course of training that was given up
            (rolled back, or rejected at a resume): they neither count nor are deleted.
        skips: positions that the run has given up; a checkpoint that learnt from them does not count and is deleted.
        safe: the newest checkpoint that has learnt from no position at or after this one is kept, too: what a rollback
            from here would go back to; and the next one, which will take its place.
    """
    assert keep_last >= 1, keep_last
    if not dist.is_main():
        return []
    limit = step_of(newest.name) if newest is not None else None
    states = {path: state for path in _listing(directory) if (state := _state_in(path)) is not None}
    known = sorted((state["step"], path) for path, state in states.items() if limit is None or state["step"] <= limit)
    good = [(step, path) for step, path in known if spoiled(states[path], skips) is None]
    kept = {path for _, path in good[-keep_last:]}
    kept |= {path for step, path in good if keep_every_steps is not None and step % keep_every_steps == 0}
    if safe is not None:
        kept |= set([path for _, path in good if states[path]["position"] <= safe][-1:])
        kept |= set([path for _, path in good if states[path]["position"] > safe][:1])
    deleted: dict[Path, Path] = {}
    for _, path in known if good else []:
        if path not in kept:
            # Under another name first: a directory that is half deleted must not look like a checkpoint.
            doomed = path.with_name(path.name + DELETED)
            with contextlib.suppress(OSError):  # tried again after the next save
                os.rename(path, doomed)
                deleted[path] = doomed
    if deleted:
        _deletions.append(threading.Thread(target=_delete, args=(list(deleted.values()),), daemon=True))
        _deletions[-1].start()
    return list(deleted)


def finish_deletions() -> None:
    """Wait for what `prune` has begun to delete. A process that ends without it leaves the rest to `remove_leftovers`."""
    while _deletions:
        _deletions.pop().join()


def _delete(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(directory: Path) -> list[Path]:
    """Remove what saves that died have left, and return it. Acts on rank 0, at start, when nobody else may write.

    A checkpoint that had stepped aside for a new one of the same step, which never came, takes its name back.

    Raises:
        UserError: it cannot be removed.
    """
    finish_deletions()
    if not dist.is_main() or not directory.is_dir():
        return []
    removed = []
    for path in sorted(directory.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None and not _PROBE.fullmatch(path.name):
            continue
        try:
            if match is None:
                path.unlink()
                removed.append(path)
                continue
            name = path.with_name(match[1])
            if match[2] == REPLACED and not name.exists():
                os.rename(path, name)
            else:
                shutil.rmtree(path)
                removed.append(path)
        except OSError as error:
            raise UserError(f"{path}: left by a save that died, and cannot be removed: {error.strerror}") from error
    return removed


def _listing(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:  # a mount that has gone: there is nothing to delete
        return []


def _state_in(path: Path) -> dict[str, Any] | None:
    """The training state of a checkpoint that is whole by its files' lengths; else None."""
    step = step_of(path.name)
    if step is None:
        return None
    try:
        check_directory(path)
        state = read_json(path / TRAINING_STATE)
        check_training_state(state, step, "")
    except (UserError, OSError):
        return None
    return state
