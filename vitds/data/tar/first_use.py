"""The indices of all shards, built where there are none yet: by as many ranks as come, without a lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from vitds import dist
from vitds.data.storage import retried
from vitds.data.tar.index import Head, index_path, read_head, write_index
from vitds.errors import UserError
from vitds.json_files import say
from vitds.progress import Progress
from vitds.shards import find_shards

Kept = TypeVar("Kept")
_AT_ONCE = 4096
"""Shards that wait for the threads: what waits takes a kilobyte each."""
READERS = 16
"""Threads that look at indices: a file server is slow to answer one question, not many."""


def shards_at(path: str, place: str) -> list[str]:
    """The shards that a path or pattern means (vitds.shards).

    Raises:
        UserError: none, or not all; `place` is named.
    """
    try:
        return find_shards(path)
    except OSError as error:
        raise UserError(f"{place}: cannot list {error.filename!r}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error


def indexed(
    shards: Sequence[str], index_dir: str | None, label_key: str | None, place: str, keep: Callable[[Head], Kept]
) -> list[Kept]:
    """Of what the indices of these shards say, what is to be kept; those that are missing or out of date are built first.

    Each rank builds its own part of them, then goes backwards through those of the others. It passes over what has come
    into being meanwhile; where two build the same index, they write the same bytes.

    Args:
        place: the section's name in the run file, for messages.
        keep: takes from what one index says the little that may be held of each shard: 300,000 lists of class names are
            20 GB. Called by several threads.

    Raises:
        UserError: a shard that cannot be used, or indices that cannot be written where they should be.
        StorageError: a shard or an index cannot be read.
    """

    def known(shard: str) -> Kept | None:
        head = current_head(shard, index_dir, label_key)
        return None if head is None else keep(head)

    kept: list[Kept | None] = []
    with Progress("indices read", len(shards), "shards", after=5) as progress, ThreadPoolExecutor(READERS) as pool:
        for first in range(0, len(shards), _AT_ONCE):
            part = shards[first : first + _AT_ONCE]
            kept += pool.map(known, part)
            if dist.is_main():
                progress.add(len(part))
    missing = [i for i, one in enumerate(kept) if one is None]
    if missing:
        _announce([shards[i] for i in missing], len(shards), index_dir, label_key)
        with Progress("shards indexed", len(missing), "shards", after=5) as progress:
            for i in in_turn(missing, dist.rank(), dist.world_size()):
                path = index_path(shards[i], index_dir, label_key)
                kept[i] = known(shards[i]) or keep(_built(shards[i], path, label_key, place))
                if dist.is_main():
                    progress.add()
    return [one for one in kept if one is not None]


def current_head(shard: str, index_dir: str | None, label_key: str | None) -> Head | None:
    """What the index of a shard says; None if there is none, or one of another state of the tar.

    Raises:
        UserError: the shard is not there.
        StorageError: it cannot be read.
    """

    def about() -> os.stat_result | None:
        try:
            return os.stat(shard)
        except FileNotFoundError:
            return None

    tar = retried(about, shard)
    if tar is None:
        raise UserError(f"{shard}: not there")
    head = read_head(index_path(shard, index_dir, label_key))
    wanted = (tar.st_size, tar.st_mtime_ns, label_key)
    return head if head is not None and (head.tar_bytes, head.tar_mtime_ns, head.label_key) == wanted else None


def in_turn(missing: Sequence[int], rank: int, ranks: int) -> list[int]:
    """In which order a rank builds: its own share first, then the others' from their ends, where they come last."""
    start, end = rank * len(missing) // ranks, (rank + 1) * len(missing) // ranks
    return [*missing[start:end], *reversed(missing[:start]), *reversed(missing[end:])]


def _announce(missing: Sequence[str], total: int, index_dir: str | None, label_key: str | None) -> None:
    if dist.is_main():
        stale = sum(os.path.exists(index_path(shard, index_dir, label_key)) for shard in missing)
        changed = f", {stale} of them because they have changed" if stale else ""
        say(f"vitds: indexing {len(missing)} of {total} shards{changed} (`vitds data index` does it ahead of a run)")


def _built(shard: str, path: str, label_key: str | None, place: str) -> Head:
    try:
        return write_index(shard, path, label_key)
    except OSError as error:
        raise UserError(
            f"{place}.index_dir: the index of {shard} cannot be written to {os.path.dirname(path)!r} "
            f"({error.strerror or error}); give a folder that can be written, or make the indices where one can, "
            "with `vitds data index`"
        ) from error
