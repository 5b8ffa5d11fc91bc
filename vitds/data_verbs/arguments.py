"""Arguments that several verbs take, and the images that they name."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitds.data import Source, SourceSection, build_source
from vitds.data.exclusion import leave_out
from vitds.data.folder import Folder
from vitds.data.sources import Role
from vitds.errors import UserError


def at_least_one(text: str) -> int:
    """A whole number ≥ 1, for argparse."""
    if not _is_at_least_one(text):
        raise argparse.ArgumentTypeError(f"expected a whole number ≥ 1, found {text!r}")
    return int(text)


def different_numbers(text: str) -> list[int]:
    """Whole numbers ≥ 1 with commas between, none of them twice, ascending, for argparse."""
    parts = text.split(",")
    numbers = {int(part) for part in parts if _is_at_least_one(part)}
    if len(numbers) < len(parts):
        raise argparse.ArgumentTypeError(
            f"expected different whole numbers ≥ 1 with commas between, as in 1,5, found {text!r}"
        )
    return sorted(numbers)


def _is_at_least_one(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) > 0


def share(text: str) -> float:
    """A number in (0, 1], for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in (0, 1], found {text!r}")
    return value


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add --workers, by default one for each core that this process may use."""
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=at_least_one, default=cores, metavar="N", help=f"processes; {cores} here")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add --config and --set."""
    parser.add_argument("--config", help="the run file whose images are meant")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for training")


def open_folder(path: str, exclude: str | None) -> tuple[Source, str]:
    """A folder of class folders without the images that a list excludes, and its absolute path.

    Raises:
        UserError: it cannot be listed, a class has a name that is not Unicode, or the list is not of this folder.
    """
    folder = _named("--from", lambda: Folder(SourceSection("folder", path=path), "train"))
    for name in folder.class_names:
        if any("\udc80" <= letter <= "\udcff" for letter in name):
            raise UserError(f"--from {path!r}: the name of the class folder {name!r} is not UTF-8; rename it")
    return folder if exclude is None else leave_out(folder, exclude, "--exclude"), folder.root


def open_path(path: str, argument: str) -> Source:
    """The images at a path; which source reads them is seen from what lies there.

    Raises:
        UserError: that source cannot read it; `argument` names the path.
    """
    section = SourceSection(source_for(path), path=path)
    return _named(argument, lambda: build_source(section, "train"))


def source_for(path: str) -> str:
    """Name of the source that reads what is at `path`: tar for shards, hf for a data set, else folder."""
    place = Path(path).expanduser()
    if not place.is_dir():  # a tar or a pattern; source tar knows best what is wrong with a path
        return "tar"
    if any(entry.suffix == ".tar" for entry in place.iterdir()):
        return "tar"
    data_set = [place / name for name in ("dataset_info.json", "dataset_dict.json", "state.json")]
    parquet = itertools.chain(place.glob("*.parquet"), place.glob("data/*.parquet"))
    if any(path.exists() for path in data_set) or any(parquet):
        return "hf"
    return "folder"


def open_role(run_file: Any, role: Role) -> Source:
    """The images of a loaded run file's role, also those that it excludes.

    Raises:
        UserError: the run file names none for the role, or they cannot be read.
    """
    section = getattr(run_file.vitds.data, role)
    if section is None:
        raise UserError(f"vitds.data.{role}: missing")
    return build_source(section, role)


def _named(argument: str, build: Callable[[], Any]) -> Any:
    """What `build` builds; in its messages the argument stands for the key of a run file."""
    try:
        return build()
    except UserError as error:
        raise UserError(str(error).replace("vitds.data.train.path", argument)) from None
