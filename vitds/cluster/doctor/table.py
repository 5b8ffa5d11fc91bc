"""The doctor's table: equal answers of many hosts on one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

GOOD, WARNING, WRONG = "ok", "warn", "WRONG"


@dataclass(frozen=True)
class Line:
    """What some hosts answered to one check."""

    check: str
    answer: str
    hosts: tuple[str, ...]
    state: str = GOOD
    """ok, warn (only may hurt) or WRONG (these hosts cannot train together)."""
    message: str = ""
    """What is wrong, in one sentence that names the hosts; empty where nothing is."""
    fix: str = ""
    """A command to paste, or what to write where."""


def ranges(hosts: Iterable[str]) -> str:
    """Host names in the brackets that pdsh and Slurm know: `n[001-003,007],login`; names without a number as they are."""
    names = [(host, re.fullmatch(r"(.*?[^0-9])([0-9]{1,9})", host)) for host in hosts]
    padded = {(found[1], len(found[2])) for _, found in names if found and found[2].startswith("0")}
    numbers: dict[tuple[str, int], list[int]] = {}
    order: list[tuple[str, tuple[str, int] | None]] = []
    for host, found in names:
        if found is None:
            order.append((host, None))
            continue
        width = len(found[2])
        key = (found[1], width if (found[1], width) in padded else 0)
        if key not in numbers:
            order.append((host, key))
        numbers.setdefault(key, []).append(int(found[2]))
    return ",".join(name if key is None else _bracketed(*key, sorted(set(numbers[key]))) for name, key in order)


def _bracketed(stem: str, width: int, numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [f"{a:0{width}}" if a == b else f"{a:0{width}}-{b:0{width}}" for a, b in runs]
    return stem + (texts[0] if len(numbers) == 1 else f"[{','.join(texts)}]")


def table(lines: Sequence[Line], names: Sequence[str]) -> str:
    """One row a line: state, check, answer, hosts; `all N` where every host of the hostfile answers the same."""
    rows = [("", "check", "answer", "hosts")]
    before = ""
    for line in lines:
        whose = f"all {len(names)}" if len(line.hosts) == len(names) > 1 else ranges(line.hosts)
        rows.append((line.state, "" if line.check == before else line.check, line.answer, whose))
        before = line.check
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]).rstrip() for row in rows)


def remarks(lines: Sequence[Line]) -> str:
    """What is wrong and what only may hurt, each with its fix; empty where there is nothing."""
    found = []
    for line in sorted((line for line in lines if line.message), key=lambda line: line.state != WRONG):
        found.append(f"{'warning: ' if line.state == WARNING else ''}{line.message}")
        if line.fix:
            found.append(f"    fix: {line.fix}")
    return "\n".join(found)


def verdict(lines: Sequence[Line], names: Sequence[str], slots: int) -> str:
    """One sentence."""
    wrong = [line for line in lines if line.state == WRONG]
    ranks = f"{len(names)} host{'s' * (len(names) > 1)}, {slots} rank{'s' * (slots > 1)}"
    if not wrong:
        count = sum(line.state == WARNING for line in lines)
        return f"verdict: {ranks}: healthy" + (f", {count} warning{'s' * (count > 1)}" if count else "")
    checks = list(dict.fromkeys(line.check for line in wrong))
    at_fault = {host for line in wrong for host in line.hosts}
    whose = ranges(name for name in names if name in at_fault)
    return f"verdict: {ranks}: not ready: {', '.join(checks)} ({whose})"
