"""Files that a verb writes: refused before any work where one is there already, and never half-written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from vitds.errors import UserError


def check_output(argument: str, path: Path | None, endings: tuple[str, ...]) -> None:
    """Refuse an output that could not be written, or would be written over.

    Raises:
        UserError: something is there already, its folder is not, or its ending is none of `endings`.
    """
    if path is None:
        return
    if path.suffix.lower() not in endings:
        raise UserError(f"{argument} {str(path)!r}: expected a name that ends with {' or '.join(endings)}")
    check_free(argument, path)


def check_free(argument: str, path: Path) -> None:
    """Refuse an output whose name is taken, by a link to nowhere too, or whose folder is not there (UserError)."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{argument} {str(path)!r}: is there already; move it away or take another name")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{argument} {str(path)!r}: there is no folder {str(path.parent)!r}")


@contextlib.contextmanager
def writing(argument: str, path: Path) -> Iterator[None]:
    """Around what writes: a full disk or a read-only one is the user's to mend (UserError)."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{argument} {str(path)!r}: cannot be written: {error}") from None


@contextlib.contextmanager
def written(argument: str, path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, to be written in the block, which then takes its place.

    Raises:
        UserError: it cannot be written.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        with writing(argument, path):
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
