"""Which tar shards a path or pattern of the run file means.

Imports nothing of vitds: the doctor asks it on hosts one by one (vitds/cluster/doctor/probe.py).
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence

_URL = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def find_shards(pattern: str) -> list[str]:
    """Absolute paths of the shards, sorted, each once; at least one.

    Args:
        pattern: a tar, a folder of `*.tar`, or a name with braces (`{000..127}` with its zeros, `{a,b}`, one in another)
            and wildcards (`*`, `?`, `[…]`, `**` for folders at any depth) for names that end in `.tar` or are folders of
            such; several of these joined by `::`. What is there under the very name that is given is meant by it.

    Raises:
        ValueError: nothing is there, or not all of what the braces name; a URL.
        OSError: a folder cannot be listed.
    """
    found: set[str] = set()
    missing: list[str] = []
    names_in: dict[str, frozenset[str]] = {}
    total = 0
    for part in [pattern] if os.path.exists(os.path.expanduser(pattern)) else pattern.split("::"):
        if _URL.match(part):
            raise ValueError(f"{part!r} is not a local path; mount the storage and give the path there")
        for name in [part] if os.path.exists(os.path.expanduser(part)) else expand_braces(part):
            path = os.path.abspath(os.path.expanduser(name))
            total += 1
            here = _matching(path, names_in)
            found.update(here)
            if not here:
                missing.append(path)
    if missing:
        raise ValueError(_missing(missing, total))
    return sorted(found)


def _matching(path: str, names_in: dict[str, frozenset[str]]) -> list[str]:
    """Shards of one path without braces. Folders are listed once: a stat for each of many shards would take long."""
    folder, name = os.path.split(path)
    if folder not in names_in and not glob.has_magic(folder):
        names_in[folder] = frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()
    if name in names_in.get(folder, ()) or os.path.exists(path):
        return _tars(path) if os.path.isdir(path) and not name.endswith(".tar") else [path]
    matches = glob.glob(path, recursive=True) if glob.has_magic(path) else []
    return [shard for match in matches for shard in ([match] if match.endswith(".tar") else _tars(match))]


def _tars(path: str) -> list[str]:
    """Those in a folder; none of what is no folder, such as the index beside a shard."""
    if not os.path.isdir(path):
        return []
    with os.scandir(path) as entries:
        return [entry.path for entry in entries if entry.name.endswith(".tar") and not entry.name.startswith(".")]


def _missing(missing: Sequence[str], total: int) -> str:
    first = missing[0]
    if total > 1:
        return f"{len(missing)} of the {total} shards or patterns that it names are not there, first {first!r}"
    if glob.has_magic(first):
        return f"nothing matches {first!r}"
    return f"{first!r} holds no *.tar" if os.path.isdir(first) else f"{first!r} is not there"


def expand_braces(text: str) -> Iterator[str]:
    """Every alternative, in the order written: `x{1,2{a,b}}` gives x1, x2a, x2b; `{08..10}` gives 08, 09, 10.

    Braces with neither a comma nor a range in them stay as they are.
    """
    start = text.find("{")
    while start >= 0:
        end = _closing(text, start)
        alternatives = _alternatives(text[start + 1 : end]) if end >= 0 else []
        if alternatives:
            tails = list(expand_braces(text[end + 1 :]))
            for alternative in alternatives:
                for middle in expand_braces(alternative):
                    yield from (text[:start] + middle + tail for tail in tails)
            return
        start = text.find("{", start + 1)
    yield text


def _closing(text: str, start: int) -> int:
    """Where the brace that opens at `start` is closed, or -1."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return i
    return -1


def _alternatives(inside: str) -> list[str]:
    """What stands between a pair of braces, taken apart; nothing if it is no list and no range."""
    bounds = _RANGE.fullmatch(inside)
    if bounds:
        first, last = bounds.groups()
        padded = any(len(bound) > 1 and bound[0] == "0" for bound in (first, last))
        width = max(len(first), len(last)) if padded else 0
        step = 1 if int(first) <= int(last) else -1
        return [f"{number:0{width}}" for number in range(int(first), int(last) + step, step)]
    parts, depth = [""], 0
    for character in inside:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts if len(parts) > 1 else []


def shard_names(paths: Sequence[str]) -> list[str]:
    """For each shard its file name; where several share one, with as many folders in front as tell them apart."""
    alike: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        alike.setdefault(os.path.basename(path), []).append(i)
    names = [""] * len(paths)
    for shards in alike.values():
        parts = [paths[i].split("/") for i in shards]
        depth = 1
        while len({tuple(one[-depth:]) for one in parts}) < len(parts):
            depth += 1
        for i, one in zip(shards, parts, strict=True):
            names[i] = "/".join(one[-depth:])
    return names
