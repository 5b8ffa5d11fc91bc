"""`vitds data index`: record where each image of tar shards lies, so that it can be read by offset."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitds.data.tar.first_use import current_head, shards_at
from vitds.data.tar.index import Head, build_index, index_path, write_index
from vitds.data_verbs.arguments import add_workers
from vitds.data_verbs.workers import each
from vitds.errors import UserError
from vitds.json_files import say
from vitds.progress import Progress

_MOST_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `vitds data index` takes."""
    parser.add_argument("--path", required=True, help="a tar, a folder of them or a pattern, as in the run file's path")
    parser.add_argument("--index-dir", metavar="DIR", help="where the indices are; beside the shards when absent")
    parser.add_argument("--label-key", metavar="KEY", help="key of the label in .json, as in the run file")
    parser.add_argument("--check", action="store_true", help="read all shards again and compare; nothing is written")
    add_workers(parser)
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def run(options: argparse.Namespace, load: Callable[..., Any]) -> int:
    """Index the shards that have no index that fits, or check the indices of all.

    Returns 1 if shards cannot be used or, when checking, have no index that fits; each is named. The others are done.

    Raises:
        UserError: no such shards, or indices that cannot be written.
        StorageError: a shard or an index cannot be read.
    """
    shards = shards_at(options.path, "--path")
    work = _Work(options.index_dir, options.label_key, options.check)
    started, done = time.monotonic(), []
    names: set[str] = set()
    with (
        Progress("shards checked" if options.check else "shards indexed", len(shards), unit="shards") as progress,
        contextlib.closing(each(work, shards, options.workers)) as results,
    ):
        for result in results:
            if (head := result.head) is not None:  # lists of 1000 names for 300,000 shards would be 20 GB
                names.update(head.class_names)
                result = replace(result, head=replace(head, class_names=[], reasons=head.reasons[:1]))
            done.append(result)
            progress.add()
    found = _summary(shards, done) | {"class_names": len(names)} | {"seconds": round(time.monotonic() - started, 2)}
    if options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _tell(found)
    return 1 if found["wrong"] else 0


@dataclass(frozen=True)
class _Done:
    """Of one shard."""

    head: Head | None = None
    built: bool = False
    wrong: str = ""


@dataclass(frozen=True)
class _Work:
    index_dir: str | None
    label_key: str | None
    check: bool

    def __call__(self, shard: str) -> _Done:
        path = index_path(shard, self.index_dir, self.label_key)
        head = current_head(shard, self.index_dir, self.label_key)
        try:
            if self.check:
                return self._checked(shard, path, head)
            if head is not None:
                return _Done(head)
            return _Done(write_index(shard, path, self.label_key), built=True)
        except UserError as error:
            return _Done(wrong=str(error).removeprefix(f"{shard}: "))
        except OSError as error:
            raise UserError(f"--index-dir: {path} cannot be written: {error.strerror or error}") from error

    def _checked(self, shard: str, path: str, head: Head | None) -> _Done:
        data = build_index(shard, self.label_key)
        if head is None:
            return _Done(wrong="no index that fits: index it anew")
        if Path(path).read_bytes() != data:
            return _Done(head, wrong="the index is not what is in the tar: remove it and index it anew")
        return _Done(head)


def _summary(shards: list[str], done: list[_Done]) -> dict[str, Any]:
    heads = [one.head for one in done if one.head is not None]
    unusable = {shard: one.head for shard, one in zip(shards, done, strict=True) if one.head and one.head.unusable}
    return {
        "shards": len(shards),
        "indexed": sum(one.built for one in done),
        "images": sum(head.count for head in heads),
        "without_label": sum(head.unusable for head in heads),
        "first_reasons": {shard: head.reasons for shard, head in list(unusable.items())[:_MOST_SHOWN]},
        "multi_label": any(head.multi_label for head in heads),
        "largest_label": max((head.largest for head in heads if head.largest is not None), default=None),
        "wrong": {shard: one.wrong for shard, one in zip(shards, done, strict=True) if one.wrong},
    }


def _tell(found: dict[str, Any]) -> None:
    print(f"{found['images']} images in {found['shards']} shards; {found['indexed']} indexed in {found['seconds']} s")
    labels = (
        f"{found['class_names']} class names" if found["class_names"] else f"largest label {found['largest_label']}"
    )
    print(labels + (", several to an image" if found["multi_label"] else ""))
    if found["without_label"]:
        shard, reasons = next(iter(found["first_reasons"].items()))
        print(f"{found['without_label']} images have no label that can be used, as in {shard}: {reasons[0]}")
    for shard, wrong in list(found["wrong"].items())[:_MOST_SHOWN]:
        say(f"vitds: {shard}: {wrong}")
    if len(found["wrong"]) > _MOST_SHOWN:
        say(f"vitds: and {len(found['wrong']) - _MOST_SHOWN} more")
