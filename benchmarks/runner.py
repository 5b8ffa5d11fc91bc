"""Runs the candidates of a benchmark by turns and writes what they took as one text table and one JSON file.

    from runner import Candidate, Column, compare, report
    table = compare("what", [Candidate("theirs", step), Candidate("ours", our_step, baseline="theirs")], rounds=7)
    report([table], "benchmarks/what.json")

Every candidate has its turn in every round, in an order that moves on from round to round, so that a noisy machine
disturbs all alike. Figures are medians over the rounds. A ratio says how many times as fast as its baseline a candidate
is, above 1 is faster; it is taken within each round, and its median, least and most are shown. A candidate that fails
becomes a row with the reason, and the others go on.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "deepspeed", "transformers", "triton", "timm", "torchao", "numpy")


class Failed(Exception):
    """A candidate cannot do its turn, for the reason given."""


@dataclass(frozen=True)
class Candidate:
    """One row.

    Args:
        turn: does the work once. What it returns are figures by name; without "seconds" among them the call is timed,
            from one wait for the device to the next.
        baseline: the candidate it is compared with.
        amounts: what a turn gets through, by name: {"images": 64} makes the figure "images/s".
        facts: figures and words that are the same in every round.
    """

    name: str
    turn: Callable[[], Mapping[str, float] | None]
    baseline: str | None = None
    amounts: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, float | str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """How a figure is printed: times `scale`, in the format `form`."""

    figure: str
    title: str
    form: str = ".2f"
    scale: float = 1.0

    def cell(self, figures: Mapping[str, Any]) -> str:
        value = figures.get(self.figure)
        if value is None:
            return "-"
        return value if isinstance(value, str) else format(value * self.scale, self.form)


MILLISECONDS = Column("seconds", "ms", ".2f", 1000)


@dataclass
class Row:
    """What one candidate took: a dict of figures a round, their medians, and the ratio to its baseline."""

    name: str
    rounds: list[dict[str, float]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    baseline: str | None = None
    ratio: float | None = None
    least: float | None = None
    most: float | None = None
    error: str | None = None


@dataclass
class Table:
    """A benchmark's rows, in the order of its candidates."""

    title: str
    columns: Sequence[Column]
    rows: list[Row]

    def __getitem__(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def text(self) -> str:
        """One line per row; a ratio as ×median (least to most), and what it is a ratio to."""
        heads = ["", *(column.title for column in self.columns), ""]
        lines = [[row.name, *(column.cell(row.figures) for column in self.columns), remark(row)] for row in self.rows]
        widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads) - 1)]
        out = []
        for name, *cells, last in [heads, *lines]:
            numbers = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
            out.append(f"{name.ljust(widths[0])}  {numbers}  {last}".rstrip())
        return "\n".join([self.title, *out])

    def json(self) -> dict[str, Any]:
        """Everything, rounds included."""
        return {"title": self.title, "rows": [vars(row) for row in self.rows]}


def remark(row: Row) -> str:
    """The row's last cell: its ratio, or why there is none."""
    said = []
    if row.ratio is not None:
        said.append(f"×{row.ratio:.2f} ({row.least:.2f} to {row.most:.2f}) of {row.baseline}")
    if row.error is not None:
        said.append(f"failed: {row.error}")
    return "; ".join(said)


def compare(
    title: str,
    candidates: Sequence[Candidate],
    *,
    rounds: int = 5,
    warmup: int = 1,
    by: str = "seconds",
    columns: Sequence[Column] = (MILLISECONDS,),
    device: torch.device | str = "cpu",
    say: Callable[[str], None] | None = None,
) -> Table:
    """Give every candidate `warmup` turns that do not count, then one in each of `rounds`.

    Args:
        by: the figure that ratios are taken of. Of "seconds" less is faster, of anything else more.
        device: what is waited for around a turn that is timed here.
        say: told about every turn, as it ends.
    """
    rows = {candidate.name: Row(candidate.name) for candidate in candidates}
    assert len(rows) == len(candidates), "two candidates of one name"
    try:
        for number in range(-warmup, rounds):
            first = max(number, 0) % max(len(candidates), 1)
            for candidate in [*candidates[first:], *candidates[:first]]:
                have_turn(candidate, rows[candidate.name], number, torch.device(device), columns, say)
    except KeyboardInterrupt:  # its time is over: what is there is shown
        for row in rows.values():
            row.error = row.error or ("no time was left" if not row.rounds else None)
    return tabulate(title, list(rows.values()), candidates, by, columns)


def tabulate(
    title: str,
    rows: Sequence[Row],
    candidates: Sequence[Candidate],
    by: str = "seconds",
    columns: Sequence[Column] = (),
) -> Table:
    """Rows whose rounds are full, summarised: for a benchmark whose candidates cannot be called one by one."""
    named = {row.name: row for row in rows}
    for candidate in candidates:
        summarise(named, candidate, by)
    return Table(title, columns or (MILLISECONDS,), list(rows))


def have_turn(
    candidate: Candidate,
    row: Row,
    number: int,
    device: torch.device,
    columns: Sequence[Column],
    say: Callable[[str], None] | None,
) -> None:
    """The candidate's turn in a round (below 0: a warm-up), unless it has failed before."""
    if row.error is not None:
        return
    said = "warm-up" if number < 0 else f"round {number + 1}"
    try:
        figures = turn(candidate, device)
    except Exception as error:
        row.error = reason(error)
        free(device)
        said += f": failed: {row.error}"
    else:
        said += f": {' '.join(column.cell(figures) for column in columns)}"
        if number >= 0:
            row.rounds.append(figures)
    if say:
        say(f"{candidate.name}: {said}")


def turn(candidate: Candidate, device: torch.device) -> dict[str, float]:
    """One turn's figures."""
    wait(device)
    begin = time.perf_counter()
    given = candidate.turn()
    wait(device)
    figures = {"seconds": time.perf_counter() - begin} | dict(given or {})
    seconds = figures["seconds"]
    return {f"{what}/s": amount / seconds for what, amount in candidate.amounts.items() if seconds > 0} | figures


def summarise(rows: Mapping[str, Row], candidate: Candidate, by: str) -> None:
    """Medians, and the ratio to the baseline over the rounds that both have."""
    row = rows[candidate.name]
    row.figures = dict(candidate.facts)
    for name in row.rounds[0] if row.rounds else ():
        values = [found[name] for found in row.rounds if found.get(name) is not None]
        row.figures[name] = statistics.median(values) if values else None
    if candidate.baseline is None or candidate.baseline not in rows:
        return
    row.baseline = candidate.baseline
    own = [found.get(by) for found in row.rounds]
    base = [found.get(by) for found in rows[candidate.baseline].rounds]
    ratios = [b / a if by == "seconds" else a / b for a, b in zip(own, base, strict=False) if a and b]
    if ratios:
        row.ratio, row.least, row.most = statistics.median(ratios), min(ratios), max(ratios)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give back the memory that nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reason(error: BaseException) -> str:
    """The first line of what went wrong, short."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0][:200] if isinstance(error, Failed) else f"{type(error).__name__}: {lines[0][:200]}"


def header(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What figures are worth nothing without: device, driver, versions, commit, date, command."""
    found = {name: version(name) for name in PACKAGES}
    return {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "command": command(),
        "commit": commit(),
        **device_facts(torch.device(device)),
        "python": platform.python_version(),
        "versions": {name: known for name, known in found.items() if known},
    }


def device_facts(device: torch.device) -> dict[str, Any]:
    """The device's name and driver, and how busy the host is."""
    host = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1)}
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        memory = torch.cuda.get_device_properties(device).total_memory
        return {
            "device": torch.cuda.get_device_name(device), "devices": torch.cuda.device_count(),
            "memory_gib": round(memory / 2**30, 1), "driver": said_by(query).split("\n")[0], "cuda": torch.version.cuda, **host,
        }  # fmt: skip
    known = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in known.splitlines() if line.startswith("model name")]
    return {"device": f"CPU {names[0] if names else platform.machine()}", **host}


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit's short name, with a + where tracked files differ from it."""
    name = said_by(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    changed = said_by(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return (name or "unknown") + ("+" if changed else "")


def command() -> str:
    """How this program was started, without the places of this machine."""
    script = Path(sys.argv[0])
    name = script.resolve().relative_to(ROOT) if script.resolve().is_relative_to(ROOT) else Path(script.name)
    words = " ".join(["python", str(name), *sys.argv[1:]])
    return words.replace(f"{ROOT}/", "").replace(str(Path.home()), "~")


def said_by(words: list[str]) -> str:
    """What a program prints; nothing where there is none, or it fails."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def head_text(facts: Mapping[str, Any]) -> str:
    """The header in three lines."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    gpu = f", driver {facts['driver']}, CUDA {facts['cuda']}, {facts['memory_gib']} GiB" if "driver" in facts else ""
    host = f"{facts['threads']} threads on {facts['cores']} cores, load {facts['load']}"
    return (
        f"$ {facts['command']}\n{facts['date']}, commit {facts['commit']}, {facts['device']}{gpu}, {host}\n"
        f"Python {facts['python']}, {versions}"
    )


def report(tables: Sequence[Table], path: Path | str | None = None, device: torch.device | str = "cpu") -> None:
    """Print header and tables; with a path, write all of it there as JSON."""
    facts = header(device)
    print("\n\n".join([head_text(facts), *(table.text() for table in tables)]), flush=True)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({**facts, "tables": [table.json() for table in tables]}, indent=1) + "\n")
