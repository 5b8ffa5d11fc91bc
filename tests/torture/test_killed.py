"""Kill it anywhere, run the same command, and the result is the run that was never killed. VITDS_TORTURE=1: every
instant × every victim; otherwise one chain of four."""

from __future__ import annotations

import itertools
import json
import os
import random
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.torture.assassin import SIGNALS, VICTIMS, Order
from tests.torture.job import INSTANTS, INTERVAL, TOTAL, job, json_lines, newest_step, order_at
from tests.torture.reshaped import differing
from vitds.metrics import read_metrics

pytestmark = pytest.mark.launch
TORTURE = bool(os.environ.get("VITDS_TORTURE"))
SEED = 7
FOUR = [
    ("mid save", "everything"),
    ("mid step", "rank 1"),
    ("before the rename", "launch.py"),
    ("evaluation", "SIGTERM to the ranks"),
]
KILLED = [victim for victim in VICTIMS if victim not in (*SIGNALS, "none, held")]
ASKED = [*SIGNALS, "launch.py", "deepspeed"]
"""After these the ranks stop by themselves and save, so that not a step is lost."""
LONGEST_CHAIN = 8


@dataclass
class Kill:
    """One life that was ended, and what the next made of it."""

    instant: str
    victim: str
    last_step: int
    """The last step logged."""
    in_flight: bool
    """Whether an unfinished save was left."""
    state: str
    """Of outcome.json."""
    resumed: int | None = None
    """The step from which the next life went on."""

    @property
    def lost(self) -> int:
        """Steps to be done once more."""
        assert self.resumed is not None
        return max(0, self.last_step - self.resumed)


@dataclass
class Chain:
    """A run directory, the lives that ended in it, and whether the last one came to the unbroken run's end."""

    run: Path
    kills: list[Kill] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    _told: int = 0

    def live(self, instant: str, victim: str, draw: random.Random, seconds: float) -> None:
        """Start the command once more and end it so; `seconds` is how long a whole life takes."""
        scratch = Path(tempfile.mkdtemp(dir=self.run.parent))
        order = order_at(instant, victim, self.run, scratch, draw) if instant != "any time" else None
        rows = len(json_lines(self.run / "metrics.jsonl"))
        before = newest_step(self.run)
        with job(self.run, order=order) as this:
            struck = order is None and this.strike_after(draw.uniform(0, seconds), victim)
            this.wait(300)
            if order is not None and not (struck := order.fired):
                self.wrong.append(f"{instant}, {victim}: never came to it: {order}\n{this.tail()}")
        self._match_starts()
        if struck:
            done = [row["step"] for row in json_lines(self.run / "metrics.jsonl")[rows:]]
            in_flight = any(self.run.glob("checkpoints/step-*[0-9].tmp"))
            self.kills.append(Kill(instant, victim, max(done, default=before), in_flight, self.state()))

    def finish(self, unbroken: Path) -> None:
        """Start the command undisturbed, and compare."""
        with job(self.run) as this:
            code = this.wait(300)
        self._match_starts()
        if self.state() != "finished" or code != 0:
            self.wrong.append(f"{self.run}: exit code {code}, outcome {self.state()}\n{this.tail()}")
            return
        self.wrong += [f"{self.run}: {what}" for what in unlike(self.run, unbroken)]

    def state(self) -> str:
        """Of outcome.json, "none" where there is none."""
        path = self.run / "outcome.json"
        return str(json.loads(path.read_text())["state"]) if path.exists() else "none"

    def _match_starts(self) -> None:
        """Each start tells the kills before it where they were resumed; one killed before it came so far tells none."""
        starts = [event["step"] for event in json_lines(self.run / "events.jsonl") if event["kind"] == "start"]
        new, self._told = starts[self._told :], len(starts)
        for kill in self.kills if new else []:
            if kill.resumed is None:
                kill.resumed = new[0]


def unlike(run: Path, unbroken: Path) -> list[str]:
    """What of a finished run is not as in the one that was never killed."""
    last = f"checkpoints/step-{TOTAL:09d}"
    found = [f"{name} differs" for name in differing(run / last, unbroken / last)]
    if (run / last / "training_state.json").read_bytes() != (unbroken / last / "training_state.json").read_bytes():
        found.append("training_state.json differs")
    ours, theirs = read_metrics(run), read_metrics(unbroken)
    if [row["step"] for row in ours] != [row["step"] for row in theirs]:
        found.append("other steps were logged")
    for one, other in zip(ours, theirs, strict=False):
        for key in one.keys() | other.keys():
            if key.startswith(("train/", "eval/", "eval_ema/")) and one.get(key) != other.get(key):
                found.append(f"step {one['step']}: {key} {one.get(key)}, unbroken {other.get(key)}")
    found += [f"{path} is left" for path in (*run.rglob("*.tmp"), *run.glob("*lease*"))]
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The run that is never killed, and the seconds it took."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    began = time.monotonic()
    with job(run) as this:
        code = this.wait(300)
        assert (run / "outcome.json").exists(), this.tail()
    assert json.loads((run / "outcome.json").read_text())["state"] == "finished"
    assert code == 0
    return run, time.monotonic() - began


def chains(deck: list[tuple[str, str]], seed: int, root: Path, unbroken: tuple[Path, float]) -> list[Chain]:
    """Play the deck: kill after kill on one run directory, until it is as far as a run goes; then on the next."""
    draw, done = random.Random(seed), []
    while deck:
        chain = Chain(Path(tempfile.mkdtemp(dir=root)) / "run")
        while deck and len(chain.kills) < LONGEST_CHAIN and newest_step(chain.run) < TOTAL and not chain.wrong:
            chain.live(*deck.pop(0), draw, unbroken[1])
        chain.finish(unbroken[0])
        done.append(chain)
    return done


def complaints(kill: Kill) -> Iterable[str]:
    """What must not be after a kill."""
    where = f"{kill.instant}, {kill.victim} (last step {kill.last_step}, resumed at {kill.resumed}): "
    if kill.resumed is None:
        yield where + "never resumed"
        return
    # A save begins at a step's end, and its first file may not be there yet when the next step has been logged.
    most = 2 * INTERVAL - 1 if kill.in_flight else INTERVAL + 1
    if kill.lost > most:
        yield where + f"lost {kill.lost} steps"
    if kill.victim in ASKED and kill.instant != "any time":
        if kill.state not in ("preempted", "finished"):
            yield where + f"outcome {kill.state}"
        if kill.lost:
            yield where + f"asked to stop, it lost {kill.lost} steps"
    elif (
        kill.victim in KILLED and kill.instant != "any time" and kill.victim not in ASKED and kill.state == "preempted"
    ):
        # At any time it may be killed before it has said anything, and what the life before it said still stands.
        yield where + "says preempted"


def table(done: list[Chain]) -> str:
    """Instant × victim: kills, of them resumed, most steps lost, and in runs that ended as the unbroken one."""
    lines = [f"{'instant':20} {'victim':21} kills resumed identical  most steps lost  saves in flight"]
    for instant, victim in itertools.product(INSTANTS, VICTIMS):
        kills = [(k, c) for c in done for k in c.kills if (k.instant, k.victim) == (instant, victim)]
        if kills:
            resumed = [k for k, _ in kills if k.resumed is not None]
            identical, in_flight = sum(not c.wrong for _, c in kills), sum(k.in_flight for k, _ in kills)
            lost = max((k.lost for k in resumed), default=0)
            counts = f"{len(kills):5} {len(resumed):7} {identical:9} {lost:16} {in_flight:16}"
            lines.append(f"{instant:20} {victim:21} {counts}")
    total = [k for c in done for k in c.kills]
    sigkills = sum(k.victim not in SIGNALS for k in total)
    lines.append(f"{len(done)} runs, {sigkills} times SIGKILL, {len(total) - sigkills} times SIGTERM or SIGUSR1")
    return "\n".join(lines)


def test_killed_anywhere_it_ends_as_the_unbroken_run(unbroken: tuple[Path, float], tmp_path: Path) -> None:
    decks = [list(FOUR)]
    if TORTURE:
        deck = [*itertools.product(INSTANTS, [*KILLED, *KILLED, *SIGNALS]), *[("any time", "everything")] * 5]
        random.Random(SEED).shuffle(deck)
        decks = [deck[0::2], deck[1::2]]
    began, most = time.monotonic(), sum(map(len, decks))
    with ThreadPoolExecutor() as players:
        played = [players.submit(chains, deck, SEED + i, tmp_path, unbroken) for i, deck in enumerate(decks)]
    done = [chain for player in played for chain in player.result()]
    seconds = time.monotonic() - began
    kills = [kill for chain in done for kill in chain.kills]
    print(f"\n{table(done)}\n{seconds:.0f} s, {seconds / max(1, len(kills)):.1f} s per kill")
    wrong = [what for chain in done for what in chain.wrong] + [what for kill in kills for what in complaints(kill)]
    assert not wrong, "\n".join(wrong)
    assert len(kills) >= most * 0.9, "too many lives ended before their time"
    assert not TORTURE or sum(kill.victim not in SIGNALS for kill in kills) >= 100


@pytest.mark.skipif(not TORTURE, reason="waits for a living owner; tests/test_run_directory.py has it in short")
def test_a_second_job_is_refused_and_the_first_undisturbed(unbroken: tuple[Path, float], tmp_path: Path) -> None:
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    scratch.mkdir()
    hold = Order("vitds.data.loader:TrainLoader.__next__", 12, "none, held", str(scratch))
    with job(run, order=hold) as first:
        while not hold.fired:
            assert len(first.processes()) > 0, first.tail()
            time.sleep(0.05)
        holder = json.loads((run / "lease.json").read_text())["pid"]
        assert holder == first.ranks()[0]
        mine = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "lease" not in path.name}
        with job(run) as second:
            assert second.wait() == 2
        assert "in use by host" in second.tail() and f"pid {holder} " in second.tail()
        assert {path: path.read_bytes() for path in mine} == mine
        (scratch / "released").touch()
        assert first.wait() == 0
    assert unlike(run, unbroken[0]) == []
