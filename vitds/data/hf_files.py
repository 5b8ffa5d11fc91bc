"""Which splits a data set on disk has, and one of them as a `datasets.Dataset`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from vitds.errors import UserError
from vitds.json_files import read_object

if TYPE_CHECKING:
    from datasets import Dataset

SPLIT_WORDS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "eval": "eval", "evaluation": "eval", "test": "test", "testing": "test",
}  # fmt: skip
"""Words in the name of a parquet file, or of the folder it is in, that tell its split."""
PIECE = re.compile(r"(.+)-\d{5,}-of-\d{5,}.*\.parquet")
"""A file's name as `datasets` and the hub give it: SPLIT-00000-of-00008.parquet."""


def find_splits(root: str, place: str) -> dict[str | None, list[str]]:
    """The splits of the data set in a directory, each with its parquet files; none, where it was saved as Arrow files.

    A data set that is not split is the only entry, under None.

    Raises:
        UserError: no such directory, no data set, or parquet files of which only some tell their split.
    """
    if not os.path.isdir(root):
        raise UserError(f"{place}: {root!r} is {'not a directory' if os.path.exists(root) else 'not there'}")
    if (index := Path(root, "dataset_dict.json")).exists():
        return {name: [] for name in read_object(index)["splits"]}
    if os.path.exists(os.path.join(root, "state.json")):
        return {None: []}
    files = sorted(
        os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names if name.endswith(".parquet")
    )
    if not files:
        raise UserError(f"{place}: {root!r} holds neither parquet files nor what save_to_disk of `datasets` writes")
    splits: dict[str | None, list[str]] = {}
    for path in files:
        splits.setdefault(_split_of(os.path.relpath(path, root)), []).append(path)
    if None in splits and len(splits) > 1:
        raise UserError(
            f"{place}: {splits[None][0]!r} tells no split, but others beside it do "
            f"({', '.join(sorted(name for name in splits if name))})"
        )
    return splits


def load(root: str, split: str | None, files: list[str], place: str) -> Dataset:
    """One split of the data set in `root`, mapped into memory.

    Parquet cannot be read by row: at first `datasets` turns it into Arrow files in its cache ($HF_DATASETS_CACHE), under
    a lock of its own, so that of many ranks one does it and the others wait. Nothing is fetched from the network.

    Raises:
        UserError: `datasets` is not installed, or cannot read the files or finds no row in them.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{place.rpartition('.')[0]}.source: 'hf' needs the library `datasets`, which cannot be imported ({error}); "
            'pip install "vitds[hf]"'
        ) from error
    datasets.disable_progress_bars()  # a job's log is no terminal
    datasets.config.HF_HUB_OFFLINE = True  # else load_dataset reports every use to a server, and waits for it
    try:
        if not files:
            return datasets.load_from_disk(os.path.join(root, split or ""))
        name = split or "train"
        return datasets.load_dataset("parquet", data_files={name: files}, split=name)
    except Exception as error:  # whatever the library and its readers raise on files that are damaged or too new
        first = error.__cause__ or error
        raise UserError(
            f"{place}: {root!r} is no data set with rows that can be read: {type(first).__name__}: {first}"
        ) from error


def _split_of(path: str) -> str | None:
    """The split that a parquet file's path, relative to the data set, tells: its name before its folders."""
    folder, name = os.path.split(path.lower())
    piece = PIECE.fullmatch(name)
    words = [piece[1]] if piece else _words(name.removesuffix(".parquet"))
    known = (SPLIT_WORDS[word] for word in [*words, *_words(folder)] if word in SPLIT_WORDS)
    return next(known, piece[1] if piece else None)


def _words(name: str) -> list[str]:
    return re.split(r"[-_. /0-9]+", name)[::-1]
