"""A host is killed, frozen, cut off or hard to reach at some time of a run on two: the fault table of `make torture-cluster`.

Each time the job must end within a bounded time with a message that names the host and the rank, leave no process behind
on any host, and the same command must finish on the host that is left, with the stream unchanged.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.cluster.hosts import Host, Hosts, two_hosts, why_not
from tests.cluster.test_two_hosts import TRAIN, run_file
from tests.launching import train
from tests.test_launch import outcome
from vitds.metrics import read_metrics

pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.skipif(not os.environ.get("VITDS_TORTURE"), reason="make torture-cluster"),
]
STEPS, SAVED_EVERY = 60, 10
HANG_SECONDS, FIRST_SECONDS = 15, 45
BOUND = 120.0
"""Seconds from the fault to the end of the command, at most: the longest bound of the watch, its grace, and what ssh takes."""
VITDS = str(Path(sys.executable).with_name("vitds"))
rows: list[str] = []


class Fault(NamedTuple):
    """What is done to a host, and which host is left to go on."""

    strike: Callable[[Hosts, Host], None]
    struck: str = "beta"
    left: str | None = "alpha"
    """None: the job is to survive it."""


FAULTS = {
    "killed": Fault(lambda hosts, host: host.kill()),
    "frozen": Fault(lambda hosts, host: host.freeze()),
    "cut off": Fault(lambda hosts, host: hosts.switch.cut(host)),
    "slow and lossy": Fault(lambda hosts, host: hosts.switch.throttle(host), left=None),
    "launching host killed": Fault(lambda hosts, host: host.kill(), struck="alpha", left="beta"),
    "launching host frozen": Fault(lambda hosts, host: host.freeze(), struck="alpha", left="beta"),
}
TIMES = ("joining", "training", "saving", "any")


def long_run_file(directory: Path) -> Path:
    config = json.loads(run_file(directory).read_text())
    config["vitds"]["train"] |= {"total_steps": STEPS, "eval_every_steps": 20}
    config["vitds"]["checkpoint"] = {"every_steps": SAVED_EVERY, "keep_last": 2}
    config["vitds"]["cluster"] = {"hang_seconds": HANG_SECONDS, "first_seconds": FIRST_SECONDS}
    path = directory / "long.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[int, dict[str, Any]]:
    """The rows of the run that nothing happened to, by step."""
    directory = tmp_path_factory.mktemp("unbroken")
    train(2, long_run_file(directory), directory / "run")
    assert outcome(directory / "run")["state"] == "finished"
    return losses(directory / "run")


def losses(run: Path) -> dict[int, dict[str, Any]]:
    return {row["step"]: row for row in read_metrics(run) if "train/loss" in row}


def start(hosts: Hosts, on: Host, hostfile: Path, config: Path, run: Path) -> tuple[subprocess.Popen[str], Path]:
    printed = hosts.directory / f"{run.name}-{on.name}.log"
    deepspeed = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(hostfile), "--force_multi"]
    words = [VITDS, "run", "--", *deepspeed, str(TRAIN), "--config", str(config), "--output-dir", str(run)]
    return hosts.start_on(on, *words, output=printed), printed


def last_step(run: Path) -> int:
    try:
        return max((row["step"] for row in read_metrics(run)), default=0)
    except (OSError, ValueError):
        return 0


def wait_until(happens: Callable[[], Any], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def await_moment(when: str, chance: random.Random, hosts: Hosts, run: Path) -> None:
    """Return at the time of the run that is meant."""
    if when == "joining":
        wait_until(lambda: any("train.py" in line for line in hosts.beta.processes().values()), 60, "no rank came up")
        time.sleep(chance.uniform(0, 8))
        return
    step = chance.randrange(4, STEPS - 15)
    wait_until(lambda: last_step(run) >= step, 120, f"step {step} never came")
    if when == "saving":
        wait_until(lambda: list((run / "checkpoints").glob("*.tmp*")) or last_step(run) > STEPS - 12, 60, "no save")
    elif when == "any":
        time.sleep(chance.uniform(0, 0.3))


@pytest.mark.parametrize("when", TIMES)
@pytest.mark.parametrize("name", FAULTS)
def test_a_host_fails(tmp_path, unbroken, name, when):
    fault, chance = FAULTS[name], random.Random(f"{name} {when}")
    config, run = long_run_file(tmp_path), tmp_path / "run"
    with two_hosts(tmp_path / "hosts") as hosts:
        struck = next(host for host in hosts.all if host.name == fault.struck)
        process, printed = start(hosts, hosts.alpha, hosts.hostfile(alpha=1, beta=1), config, run)
        await_moment(when, chance, hosts, run)
        at, began, clock = last_step(run), time.monotonic(), time.time()
        fault.strike(hosts, struck)
        if fault.left is None:
            assert process.wait(timeout=400) == 0, printed.read_text()[-6000:]
            rows.append(f"{name:22} {when:9} step {at:2}: finished")
        else:
            left = next(host for host in hosts.all if host.name == fault.left)
            seconds = after_the_fault(process, printed, hosts, left, struck, began)
            message = check_what_was_said(run, printed, struck, clock, left)
            saved = max(
                (int(p.name[5:]) for p in (run / "checkpoints").glob("step-*") if p.name[5:].isdigit()), default=0
            )
            again, log = start(hosts, left, hosts.hostfile(**{left.name: 1}), config, run)
            assert again.wait(timeout=240) == 0, log.read_text()[-6000:]
            if struck.init:
                struck.thaw()
                wait_until(lambda: not struck.processes(), BOUND, f"{struck.name} still runs {struck.processes()}")
            rows.append(
                f"{name:22} {when:9} step {at:2}: ended after {seconds:5.1f} s, lost {max(0, at - saved):2} steps; {message}"
            )
        print(rows[-1], flush=True)
        assert not any(host.processes() for host in hosts.all)
    assert outcome(run)["state"] == "finished"
    found = losses(run)
    assert found.keys() == unbroken.keys()
    for step, row in unbroken.items():
        assert found[step]["train/loss"] == pytest.approx(row["train/loss"], rel=2e-4), step
        assert found[step]["train/images_seen"] == row["train/images_seen"]


def after_the_fault(
    process: subprocess.Popen[str], printed: Path, hosts: Hosts, left: Host, struck: Host, began: float
) -> float:
    """Wait for the end of everything on the host that is left; seconds since the fault."""
    if struck is hosts.alpha:  # the command went or stands still with it
        wait_until(lambda: not left.processes(), BOUND, f"{left.name} still runs {left.processes()}")
    else:
        assert process.wait(timeout=BOUND) not in (0, 2), printed.read_text()[-6000:]
        assert not left.processes(), left.processes()
    return time.monotonic() - began


def check_what_was_said(run: Path, printed: Path, struck: Host, clock: float, left: Host) -> str:
    """outcome.json names the host and its rank, and so does the console of a launcher that is left; the message."""
    file = run / "outcome.json"
    said = json.loads(file.read_text()) if file.exists() else {}
    if "incident" not in said:  # nothing had been agreed on yet: the launcher's console is all there is
        text = printed.read_text()
        assert struck.name in text, text[-6000:]
        return next(
            (line for line in text.splitlines() if line.startswith("vitds") and struck.name in line),
            "(ssh's own words)",
        )
    incident = said["incident"]
    if incident["hosts"]:  # else all are alive, and nobody can tell which end of the link is cut
        assert incident["hosts"] == [struck.name], incident
        assert incident["ranks"] == [0 if struck.name == "alpha" else 1]
    assert f"rank {0 if struck.name == 'alpha' else 1} on {struck.name}" in incident["message"]
    if left.name == "alpha":
        assert incident["message"].splitlines()[0] in printed.read_text()
    return f"said after {said['time'] - clock:.1f} s: {incident['message'].splitlines()[0]}"
