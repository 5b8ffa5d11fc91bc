"""The directory of one save: made, filled, sealed with its manifest and given its true name; or removed without a trace."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from vitds import dist
from vitds.checkpoint.files import FileRecord, sync_directory, to_json
from vitds.checkpoint.format import (
    FORMAT_VERSION,
    OPTIMIZER,
    REPLACED,
    TRAINING_STATE,
    Manifest,
    check_file_name,
    index_json,
    index_name,
    write_manifest,
)
from vitds.checkpoint.gather import Plan
from vitds.checkpoint.retention import finish_deletions
from vitds.checkpoint.share import Written
from vitds.lease import Place, place_of


def small_files(plan: Plan, training_state: dict[str, Any], extra_files: dict[str, bytes]) -> dict[str, bytes]:
    """Everything but tensors and the manifest: name -> content."""
    small = dict(extra_files)
    small[TRAINING_STATE] = to_json({**training_state, "format_version": FORMAT_VERSION})
    for kind in plan.kinds:
        files = {file.name: file.specs for file in plan.files if file.kind == kind}
        if len(files) != 1 or kind == OPTIMIZER:
            small[index_name(kind)] = index_json(files)
    for name in small:
        check_file_name(name, "extra_files")
    return small


def make_directory(temporary: Path, needed: int) -> None:
    """An empty directory to write into, and `checkpoints/` around it.

    The run directory around that is never made again: with its mount gone, what is left in its place is another disk's.
    Says before any work that the disk is too small; a file system that does not tell its size is believed.

    Raises:
        OSError: no room, or the run directory has vanished.
    """
    directory = temporary.parent
    run = place_of(directory.parent)
    if run is None:  # no `RunDirectory` has made it
        directory.parent.mkdir(parents=True, exist_ok=True)
        run = Place(directory.parent)
    run.check()
    directory.mkdir(exist_ok=True)
    if temporary.exists():
        shutil.rmtree(temporary)
    disk = shutil.disk_usage(directory)
    if disk.total > 0 and disk.free < needed:
        finish_deletions()
        disk = shutil.disk_usage(directory)
    if disk.total > 0 and disk.free < needed:
        raise OSError(f"{needed / 1e9:.1f} GB needed, {disk.free / 1e9:.1f} GB free at {directory}")
    temporary.mkdir()


def seal(temporary: Path, final: Path, step: int, hosts: list[str], written: list[Written]) -> None:
    """See that every file is there, write the manifest, and take the true name. On rank 0.

    Args:
        temporary: where the files are.
        final: the name that makes it a checkpoint.
        step: of the checkpoint.
        hosts: of each rank.
        written: what each rank has written.

    Raises:
        OSError: a file that this rank does not see as it was written, or what the disk says.
    """
    records: dict[str, FileRecord] = {}
    for rank, of_rank in enumerate(written):
        for name, record in of_rank.records.items():
            path = temporary / name
            size = path.stat().st_size if path.exists() else None
            if size != record.bytes:
                seen = "is not seen" if size is None else f"is {size:,} bytes long as seen"
                raise OSError(
                    f"{path}: written with {record.bytes:,} bytes by rank {rank} on {hosts[rank]}, {seen} by rank 0: "
                    "the output directory must be shared by all hosts"
                )
            records[name] = record
    write_manifest(temporary, Manifest(step, records))
    sync_directory(temporary)
    take_name(temporary, final)
    sync_directory(final.parent)


def take_name(temporary: Path, final: Path) -> None:
    """Rename to the true name. A directory that has it already steps aside first, and is put back by
    `retention.remove_leftovers` should we die between the two renames."""
    if not final.exists():
        os.rename(temporary, final)
        return
    old = final.with_name(final.name + REPLACED)
    if old.exists():
        shutil.rmtree(old)
    os.rename(final, old)
    try:
        os.rename(temporary, final)
    except OSError:
        os.rename(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def clear(temporary: Path, written: Written) -> None:
    """Remove what a failed save has left: rank 0 all that it sees, each other rank its own files, wherever they are."""
    if dist.is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        for name in written.names:
            (temporary / name).unlink(missing_ok=True)
        temporary.rmdir()
