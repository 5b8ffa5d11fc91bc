"""One run of the user's own command, as its processes: start it, end some of them, see that all are gone."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.launching import DEEPSPEED, ROOT, environment, free_port
from tests.torture.assassin import Order, strike

TOTAL, INTERVAL, COOLDOWN, RANKS, ACCUMULATION = 24, 4, 6, 2, 2
SETTINGS = [
    f"vitds.train.total_steps={TOTAL}", f"vitds.checkpoint.every_steps={INTERVAL}", "vitds.train.log_every_steps=1",
    "vitds.train.eval_every_steps=6", "vitds.train.diagnostics_every_steps=0", "vitds.model.depth=1", "vitds.ema.decay=0.9",
    f"train_batch_size={6 * RANKS * ACCUMULATION}", "train_micro_batch_size_per_gpu=6", "tensorboard.enabled=false",
    f'scheduler.params={{"warmup_steps":2,"timescale_steps":4,"cooldown_steps":{COOLDOWN}}}',
    'vitds.plugins=["tests.torture.assassin"]',
]  # fmt: skip
MARK = "VITDS_TEST_JOB"
LONG_ENOUGH = 180.0
"""Seconds for the launcher to end the ranks that are left (30 by its own rule), on a busy machine."""


class Job:
    """`deepspeed … launcher/train.py` on a run directory.

    Args:
        run: the output directory.
        sets: further `--set` words.
        order: what the assassin in the ranks is to do.
    """

    def __init__(self, run: Path, *sets: str, order: Order | None = None) -> None:
        self.log = run.with_name(f"{run.name}.log")
        self._mark = f"{MARK}={uuid.uuid4().hex}"
        words = [word for text in [*SETTINGS, *sets] for word in ("--set", text)]
        command = [
            str(DEEPSPEED), "--num_gpus", str(RANKS), "--master_port", str(free_port()), str(ROOT / "launcher/train.py"),
            "--config", str(ROOT / "ds_configs/digits.json"), "--output-dir", str(run), *words,
        ]  # fmt: skip
        more = dict([self._mark.split("=")]) | (order.to_environment() if order else {})
        with open(self.log, "a") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment(**more), stdout=log, stderr=log, start_new_session=True
            )

    def processes(self) -> list[int]:
        """Process ids of all that is alive of this job, found by a mark in their environment, whoever their parent."""
        self._process.poll()
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and self._mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def ranks(self) -> list[int]:
        """Process ids of the ranks, by rank; none before they have all started."""
        by_rank = {}
        for pid in self.processes():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                rank = next((word for word in words if word.startswith(b"RANK=")), None)
                if rank and b"--local_rank=" in b" ".join(line) and parent_is_launcher(pid):
                    by_rank[int(rank[5:])] = pid
        return [by_rank[rank] for rank in range(RANKS)] if len(by_rank) == RANKS else []

    def strike_after(self, seconds: float, victim: str) -> bool:
        """From outside: the victim's signal after so many seconds; before there are ranks, SIGKILL to everything.

        Returns:
            False when the job ended by itself before that.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
            return False
        if ranks := self.ranks():
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it has just ended by itself
                strike(victim, ranks)
        else:
            self.end()
        return True

    def wait(self, seconds: float = LONG_ENOUGH) -> int | None:
        """Until no process is left; the command's exit code.

        Raises:
            AssertionError: some are still there after so long.
        """
        deadline = time.monotonic() + seconds
        while (left := self.processes()) or self._process.returncode is None:  # in exec, a process has no environment
            assert time.monotonic() < deadline, f"left behind: {[_command(pid) for pid in left]}\n{self.tail()}"
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.1)
            if self._process.returncode is not None:
                time.sleep(0.05)  # those that are no children of ours cannot be waited for
        return self._process.returncode

    def end(self) -> None:
        """SIGKILL to whatever is left."""
        while (left := self.processes()) or self._process.returncode is None:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def tail(self, characters: int = 4000) -> str:
        """The end of what all lives on this run directory have printed."""
        return self.log.read_text(errors="replace")[-characters:]


@contextmanager
def job(run: Path, *sets: str, order: Order | None = None) -> Iterator[Job]:
    """A job of which nothing is left at the end of the block, whatever happens there."""
    this = Job(run, *sets, order=order)
    try:
        yield this
    finally:
        this.end()


def parent_is_launcher(pid: int) -> bool:
    """Whether it was started by DeepSpeed's launch.py (a rank, and not a data worker of one)."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return "deepspeed.launcher.launch" in _command(parent)


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return f"{pid} {Path(f'/proc/{pid}/cmdline').read_bytes().replace(bytes(1), b' ').decode(errors='replace')}"
    return f"{pid} gone"


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON rows; none where there is no file."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def newest_step(run: Path) -> int:
    """Step of the newest checkpoint, 0 where there is none."""
    return max((int(p.name[5:]) for p in run.glob("checkpoints/step-*") if p.name[5:].isdigit()), default=0)


def order_at(instant: str, victim: str, run: Path, scratch: Path, draw: random.Random) -> Order:
    """The order that ends `victim` at an instant of the next start's life.

    Args:
        instant: one of INSTANTS but "any time".
        victim: one of assassin.VICTIMS.
        run: the run directory as it is now; from its checkpoint follows how many calls the instant is away.
        scratch: an empty directory of the order's own.
        draw: draws the rest.
    """
    left = TOTAL - newest_step(run)
    here: dict[str, Any] = {"victim": victim, "scratch": str(scratch)}
    backward, anyone = "vitds.zero.engine:TrainingEngine.backward", draw.randrange(RANKS)
    if instant == "first step":
        return Order(backward, draw.randint(1, ACCUMULATION), rank=anyone, after=draw.random() < 0.5, **here)
    if instant == "mid step":
        most = min(left, 2 * INTERVAL) * ACCUMULATION
        return Order(backward, draw.randint(min(ACCUMULATION + 1, most), most), rank=anyone, **here)
    if instant == "update":
        most = min(left, 2 * INTERVAL) * ACCUMULATION
        count = draw.randint(1, most // ACCUMULATION) * ACCUMULATION
        return Order("vitds.zero.engine:TrainingEngine.step", count, rank=anyone, after=draw.random() < 0.5, **here)
    if instant == "cooldown":
        first = max(left - COOLDOWN, 0) * ACCUMULATION
        return Order(backward, draw.randint(first + 1, left * ACCUMULATION), rank=anyone, **here)
    if instant == "evaluation":
        return Order("vitds.evaluation.classification:to_model_range", draw.randint(1, 60), rank=anyone, **here)
    if instant == "mid save":
        writes = (9, 2)[anyone] * (1 if left <= INTERVAL else 2)  # rank 0 has the small files too
        return Order("vitds.checkpoint.files:DurableFile.write", draw.randint(1, writes), rank=anyone, **here)
    if instant == "before the manifest":
        return Order("vitds.checkpoint.directory:write_manifest", 1, **here)
    if instant == "before the rename":
        return Order("os:rename", 1, within=".tmp", **here)
    assert instant == "after the rename", instant
    return Order("os:rename", 1, within=".tmp", after=True, **here)


INSTANTS = (
    "first step", "mid step", "update", "mid save", "before the manifest", "before the rename", "after the rename",
    "evaluation", "cooldown", "any time",
)  # fmt: skip
