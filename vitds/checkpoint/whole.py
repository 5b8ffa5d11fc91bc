"""Whether a checkpoint's files are there and are what they should be, before anything in them is believed."""

from __future__ import annotations

import stat
from pathlib import Path

from vitds.checkpoint.files import FileRecord, sha256_of
from vitds.checkpoint.format import MANIFEST, Manifest, check_directory
from vitds.errors import UserError

TENSORS = ".safetensors"


def check_whole(path: Path) -> Manifest:
    """`format.check_directory`, and that every file is one: no link to elsewhere, no device that would be waited for.

    What is small, all but the tensors, is hashed here, before anything in it is believed.
    """
    check_file(path / MANIFEST)
    manifest = check_directory(path)
    for name, record in manifest.files.items():
        check_file(path / name)
        if not name.endswith(TENSORS):
            check_sum(path / name, record)
    return manifest


def check_sum(path: Path, record: FileRecord) -> None:
    """UserError if a file's content is not what the manifest says was saved."""
    if sha256_of(path) != record.sha256:
        raise UserError(f"{path}: its content is not what was saved (SHA-256 differs from the manifest)")


def check_file(path: Path) -> None:
    """A regular file, by itself or by a link that stays in the directory; a missing one is not our concern here."""
    if path.is_symlink() and path.resolve().parent != path.parent.resolve():
        raise UserError(f"{path}: a link to {path.resolve()}, outside the checkpoint; copy the file itself there")
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise UserError(f"{path}: not a regular file")
