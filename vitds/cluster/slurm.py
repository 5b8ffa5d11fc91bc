"""Slurm's words: `gpu[001-004,007]` for hosts, `2(x3),1` for a number on each, and variables for GPUs and tasks."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping

from vitds.cluster.hostfile import MAX_HOSTS, check_host_name
from vitds.errors import UserError

TASKS = "tasks, not GPUs; if that is wrong, give --slots"
"""Said of slots that are no number of GPUs."""
_TOO_MANY = f"more than {MAX_HOSTS} hosts"


def expand_nodelist(text: str, where: str) -> list[str]:
    """The hosts of a Slurm node list, in Slurm's order: the last range of a name runs fastest.

    A name may have any number of ranges (`rack[1-2]node[01-16]-ib`), with numbers padded as wide as a range's first.

    Raises:
        UserError: `where`, and what in `text` is no node list, is no host name, comes twice, or that there are more
            than `MAX_HOSTS`, which is known before any is made.
    """
    if not text.strip() or text.strip() == "(null)":
        raise UserError(f"{where}={text!r}: no node list; is this inside a job?")
    pieces = [_pieces(item, where) for item in _items(text.strip(), where)]
    if sum(math.prod(count for count, _ in item) for item in pieces) > MAX_HOSTS:
        raise UserError(f"{where}: {text[:200]!r} stands for {_TOO_MANY}")
    names: list[str] = []
    for item in pieces:
        names += ["".join(parts) for parts in itertools.product(*(_spelt(ranges) for _, ranges in item))]
    seen: set[str] = set()
    for name in names:
        check_host_name(name, where)
        if name in seen:
            raise UserError(f"{where}={text[:200]!r}: {name!r} is there twice")
        seen.add(name)
    return names


def expand_counts(text: str, where: str) -> list[int]:
    """`2(x3),1` as [2, 2, 2, 1].

    Raises:
        UserError: `where`, and what of `text` is no such list.
    """
    counts: list[int] = []
    for item in text.strip().split(","):
        found = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", item.strip())
        if not found:
            raise UserError(f"{where}={text[:200]!r}: {item[:80]!r} is not a number of tasks such as 8 or 8(x4)")
        if len(counts) + int(found[2] or 1) > MAX_HOSTS:
            raise UserError(f"{where}={text[:200]!r}: {_TOO_MANY}")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def slurm_slots(environ: Mapping[str, str], num_hosts: int) -> tuple[list[int], str]:
    """Slots of each of `num_hosts` hosts, and where from; ([], "") where Slurm says nothing.

    GPUs come before tasks, and what Slurm says of all hosts before what it says of this one.

    Raises:
        UserError: a variable is not what Slurm writes.
    """
    if text := environ.get("SLURM_GPUS_PER_NODE"):
        name = "SLURM_GPUS_PER_NODE"
        by = f"{name}={text} (GPUs)"
        if "(x" in text:
            each = []
            for item in text.split(","):
                number, _, times = item.partition("(x")
                each += expand_counts(f"{number_of_gpus(number, name)}" + (f"(x{times}" if times else ""), name)
            return each, by
        return [number_of_gpus(text, name)] * num_hosts, by
    tasks, per_task = environ.get("SLURM_TASKS_PER_NODE"), environ.get("SLURM_GPUS_PER_TASK")
    if tasks and per_task:
        each = [
            count * number_of_gpus(per_task, "SLURM_GPUS_PER_TASK")
            for count in expand_counts(tasks, "SLURM_TASKS_PER_NODE")
        ]
        return each, f"SLURM_TASKS_PER_NODE={tasks} × SLURM_GPUS_PER_TASK={per_task} (GPUs)"
    here = 0
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS"):
        text = environ.get(name, "")
        if text and not here:
            here = number_of_gpus(text, name) if name == "SLURM_GPUS_ON_NODE" else _length(text, name)
            by = f"{name}={text} (GPUs{' of this host, taken for all' if num_hosts > 1 else ''})"
    if here:
        return [here] * num_hosts, by
    for name in ("SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        if text := environ.get(name):
            counts = expand_counts(text, name)
            return counts * num_hosts if name == "SLURM_NTASKS_PER_NODE" else counts, f"{name}={text} ({TASKS})"
    return [], ""


def number_of_gpus(text: str, where: str) -> int:
    """8 of `8`, `h100:8` or `gres/gpu:h100:8`, 3 of `a100:2,v100:1`.

    Raises:
        UserError: `where`, and `text`, which is none of these.
    """
    items = text.strip().split(",")
    found = [re.fullmatch(r"((?:[A-Za-z][\w./-]*:)*)([0-9]{1,6})", item.strip()) for item in items]
    if not all(found) or (len(items) > 1 and not all(match and match[1] for match in found)):
        raise UserError(f"{where}={text[:200]!r}: not a number of GPUs such as 8 or h100:8; give --slots")
    return sum(int(match[2]) for match in found if match)


def _length(text: str, where: str) -> int:
    """4 of `0,1,2,3` or `0-3`."""
    return len(expand_nodelist(f"gpu[{text}]", where))


_Range = tuple[int, int, int]
"""First and last number, and how wide they are written; a text is kept as a range of its own, see `_spelt`."""


def _items(text: str, where: str) -> list[str]:
    """The list split at its commas, not at those in brackets."""
    items, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if not 0 <= depth <= 1:
            raise UserError(f"{where}={text[:200]!r}: brackets do not match")
        if letter == "," and depth == 0:
            items.append("")
        else:
            items[-1] += letter
    if depth:
        raise UserError(f"{where}={text[:200]!r}: brackets do not match")
    if not all(items):
        raise UserError(f"{where}={text[:200]!r}: an empty name between commas")
    return items


def _pieces(item: str, where: str) -> list[tuple[int, str | list[_Range]]]:
    """What a name is made of, each with the number of its spellings: texts, and lists of ranges."""
    pieces: list[tuple[int, str | list[_Range]]] = []
    for i, part in enumerate(re.split(r"\[([^\[\]]*)\]", item)):
        if i % 2 == 0:
            pieces.append((1, part))
            continue
        ranges = [_range(one, item, where) for one in part.split(",")]
        pieces.append((sum(last - first + 1 for first, last, _ in ranges), ranges))
    return pieces


def _range(text: str, item: str, where: str) -> _Range:
    found = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", text)
    if not found:
        raise UserError(f"{where}: {text[:80]!r} in {item[:120]!r} is not a range such as 7 or 001-004")
    low, high = found[1], found[2] or found[1]
    if int(high) < int(low):
        raise UserError(f"{where}: the range {text!r} in {item[:120]!r} runs backwards")
    if high.startswith("0") and len(high) != len(low):
        raise UserError(f"{where}: the ends of the range {text!r} in {item[:120]!r} are padded differently")
    return int(low), int(high), len(low)


def _spelt(piece: str | list[_Range]) -> list[str]:
    if isinstance(piece, str):
        return [piece]
    return [f"{number:0{width}d}" for first, last, width in piece for number in range(first, last + 1)]
