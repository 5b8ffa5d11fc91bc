"""`vitds doctor`: whether the hosts of a hostfile can train together, and what mends it where they cannot."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import secrets
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from vitds.cluster.doctor import links, probe
from vitds.cluster.doctor.checks import check
from vitds.cluster.doctor.comparing import Job, data_paths
from vitds.cluster.doctor.network import Measured, link_lines
from vitds.cluster.doctor.sessions import NO_DIRECTORY, Answer, ask, deepspeed_environment
from vitds.cluster.doctor.table import WRONG, Line, ranges, remarks, table, verdict
from vitds.cluster.hostfile import read_hostfile

LOOK_SECONDS = 5.0
"""How long a file server may take to show one host what another has written."""
ALL_REDUCE_MEBIBYTES = {"cpu": 8, "cuda": 256}
_MOST_PEERS = 16

Load = Callable[[str, list[str], int], Any]
"""(run file, its overrides, world size) -> the checked run file; `.resolved` is read."""


def add_verb(verbs: Any) -> None:
    """Add `doctor` to the parser's verbs."""
    doctor = verbs.add_parser(
        "doctor", help="check that the hosts of a hostfile can train together; exit code 1 if they cannot"
    )
    doctor.add_argument("--hostfile", required=True, help="hosts and slots, as `deepspeed --hostfile` takes them")
    doctor.add_argument("--config", required=True, help="the run file that is to be trained")
    doctor.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    doctor.add_argument("--output-dir", help="must be one directory on all hosts")
    doctor.add_argument("--master-port", type=_port, default=29500, metavar="N", help="as deepspeed's --master_port")
    doctor.add_argument("--timeout", type=_seconds, default=60.0, metavar="S", help="seconds a host may take")
    doctor.add_argument("--no-links", action="store_true", help="do not measure latency and bandwidth")
    doctor.add_argument("--fix", action="store_true", help="remove stale locks of builds that have died")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(options: argparse.Namespace, load: Load) -> int:
    """Do what `add_verb` has parsed: 0 where all is well, 1 where these hosts cannot train together.

    Ends within about three times --timeout, whatever the hosts do.

    Raises:
        UserError: a hostfile, run file or .deepspeed_env that is wrong by itself; a number of ranks that the run file
            does not allow.
    """
    hosts = tuple(read_hostfile(options.hostfile))
    resolved = load(options.config, options.set, sum(host.slots for host in hosts)).resolved
    job = Job(hosts, options.master_port, options.config, options.output_dir, os.path.abspath("."))
    environment = deepspeed_environment(os.environ, Path.cwd(), Path.home())
    before = signal.signal(signal.SIGTERM, _leave)  # through every `finally`, which ends the ssh sessions
    try:
        started = time.monotonic()
        lines, speeds = examine(job, resolved, environment, options.timeout, options.fix, not options.no_links)
    finally:
        signal.signal(signal.SIGTERM, before)
    names = [host.name for host in hosts]
    wrong = any(line.state == WRONG for line in lines)
    said = verdict(lines, names, job.world_size)
    if options.json:
        found = {"healthy": not wrong, "verdict": said, "hosts": {host.name: host.slots for host in hosts}}
        found |= {"lines": [dataclasses.asdict(line) for line in lines], "links": speeds}
        print(json.dumps(found | {"seconds": round(time.monotonic() - started, 2)}, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(filter(None, [table(lines, names), remarks(lines), said])))
    return 1 if wrong else 0


def examine(
    job: Job, resolved: Mapping[str, Any], environment: Mapping[str, str], seconds: float, fix: bool, measure: bool
) -> tuple[list[Line], list[dict[str, Any]]]:
    """Ask every host, compare, and measure the links where nothing speaks against it: (lines, what was measured)."""
    names = [host.name for host in job.hosts]
    local = len(names) == 1  # DeepSpeed starts the only host of a hostfile without ssh, on the machine it runs on
    source = Path(probe.__file__).read_text(encoding="utf-8")
    token = secrets.token_hex(4)
    requests = {name: _request(job, name, resolved, token, seconds, fix) for name in names}
    answers = ask(source, requests, environment, seconds, local=local)
    facts: dict[str, dict[str, Any]] = {}
    for answer in answers:
        if len(answer.rows) == 2:
            clock = answer.rows[0]["time"]
            facts[answer.host] = {**answer.rows[1], "clock": (clock - answer.received[0], clock - answer.started)}
    lines = list(reached(job, answers))
    _look(facts, source, environment, local)
    lines += check(job, facts)
    if not measure or len(facts) < len(names) or job.world_size == 1:
        return lines, []
    if any(line.state == WRONG and line.check not in ("output", "config", "vitds", "limits") for line in lines):
        return [*lines, Line("links", "not measured: mend the rest first", tuple(names))], []
    found, rows = _measure(job, facts, environment, seconds, local)
    return lines + found, rows


def reached(job: Job, answers: Sequence[Answer]) -> Iterator[Line]:
    """Which hosts answered at all, and why the others did not."""
    good = [answer for answer in answers if len(answer.rows) == 2]
    if good and len(job.hosts) == 1:
        own, name = good[0].rows[1], job.first
        here = {address for addresses in own["interfaces"].values() for address in addresses}
        if name.split(".")[0] not in (own["hostname"].split(".")[0], "localhost") and not here & set(_addresses(name)):
            message = (
                f"{name} is the only host, and DeepSpeed starts that one where it runs itself: on {own['hostname']}"
            )
            yield Line(
                "ssh", f"is {own['hostname']}", (name,), WRONG, message, f"run it on {name}, or deepspeed --force_multi"
            )
            return
    if good:
        slowest = max(answer.seconds for answer in good)
        yield Line("ssh", f"answered within {slowest:.1f} s", tuple(answer.host for answer in good))
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for answer in answers:
        if answer not in good:
            text, message, fix = _why_not(answer, job)
            groups.setdefault((text, fix), {})[answer.host] = message
    for (text, fix), messages in groups.items():
        first, more = next(iter(messages)), f"  (and {len(messages) - 1} more)" if len(messages) > 1 else ""
        message = f"{ranges(messages)}: {messages[first]}"
        yield Line("ssh", text, tuple(messages), WRONG, message, fix.replace("HOST", first) + more)


_SSH_FAULTS = (
    ("could not resolve hostname", "unknown name", "getent hosts HOST; correct the hostfile, DNS or /etc/hosts"),
    ("connection refused", "no sshd", "ping -c 3 HOST, and on HOST: sudo systemctl start ssh"),
    ("permission denied", "no key", "ssh-copy-id HOST"),
    ("remote host identification has changed", "other host key", "ssh-keygen -R HOST && ssh-keyscan -H HOST >> ~/.ssh/known_hosts"),
    ("host key verification failed", "host key", "ssh-keyscan -H HOST >> ~/.ssh/known_hosts, if that is the host you mean"),
    ("timed out", "no answer", "ping -c 3 HOST; start it, or leave it out of the hostfile"),
    ("no route to host", "no route", "ping -c 3 HOST; start it, or leave it out of the hostfile"),
    ("network is unreachable", "no network", "ip route get HOST; ping -c 3 HOST"),
    ("not responding", "gone", "ping -c 3 HOST; start it, or leave it out of the hostfile"),
)  # fmt: skip
"""(what ssh says, in lower case; short; what to do)."""


def _why_not(answer: Answer, job: Job) -> tuple[str, str, str]:
    """(answer in the table, message, fix with HOST for the host)."""
    if answer.code is None:
        return (
            "hung",
            f"did not answer within {answer.seconds:.0f} s",
            "ping -c 3 HOST; ssh HOST uptime; reboot it, or leave it out",
        )
    if answer.code == NO_DIRECTORY:
        directory = shlex.quote(job.directory)
        return (
            "no such directory",
            f"{job.directory}, where DeepSpeed starts, is not there",
            f"ssh HOST ls -d {directory}",
        )
    if answer.code in (126, 127):
        fix = "ssh HOST " + shlex.quote(f"cd {shlex.quote(job.directory)} && make setup")
        return "no Python", f"{sys.executable} cannot be started there: {answer.said}", fix
    for words, short, fix in _SSH_FAULTS:
        if answer.code == 255 and words in answer.said.lower():
            return short, f"ssh: {answer.said.removeprefix('ssh: ')}", fix
    if answer.code == -signal.SIGALRM or answer.code == 128 + signal.SIGALRM:
        return (
            "hung",
            f"its own check hung for {answer.seconds:.0f} s: a file server or driver that does not answer",
            "ssh HOST dmesg",
        )
    return f"failed ({answer.code})", answer.said or f"ssh ended with {answer.code}", "ssh HOST true"


def _request(job: Job, name: str, resolved: Mapping[str, Any], token: str, seconds: float, fix: bool) -> dict[str, Any]:
    names = [host.name for host in job.hosts]
    peers = names if len(names) <= _MOST_PEERS else [names[0], names[1]]
    return {
        "limit": seconds, "fix": fix, "config": job.config, "output": job.output, "data": data_paths(resolved),
        "token": f".vitds-doctor-{token}-{names.index(name)}", "port": job.port if name == names[0] else None,
        "peers": [peer for peer in peers if peer != name],
    }  # fmt: skip


def _look(facts: dict[str, dict[str, Any]], source: str, environment: Mapping[str, str], local: bool) -> None:
    """Let every host say which of the files that all have left it sees; then remove them."""
    paths = [known["output"]["path"] for known in facts.values() if known["output"] and "path" in known["output"]]
    if not paths:
        return
    limit = LOOK_SECONDS + 15
    request = {"look": paths, "patience": LOOK_SECONDS, "limit": limit}
    try:
        for answer in ask(source, dict.fromkeys(facts, request), environment, limit, local=local):
            facts[answer.host]["seen"] = answer.rows[0]["seen"] if answer.rows else None
    finally:
        # One host of each kind will do: mostly they all see all.
        kinds = {frozenset(known.get("seen") or [host]): host for host, known in facts.items()}
        removal = {"remove": paths, "limit": limit}
        ask(source, dict.fromkeys(kinds.values(), removal), environment, limit, local=local)


def _measure(
    job: Job, facts: Mapping[str, Mapping[str, Any]], environment: Mapping[str, str], seconds: float, local: bool
) -> tuple[list[Line], list[dict[str, Any]]]:
    kinds = {known["accelerators"]["kind"] for known in facts.values()}
    kind = kinds.pop() if len(kinds) == 1 else "cpu"
    master = facts[job.first]["addresses"][0] if facts[job.first]["addresses"] else job.first
    slots = [host.slots for host in job.hosts]
    common = {
        "mark": probe.MARK,
        "limit": seconds,
        "slots": slots,
        "master": ["127.0.0.1" if local else master, job.port],
    }
    common |= {"accelerators": kind == "cuda", "mebibytes": ALL_REDUCE_MEBIBYTES[kind]}
    requests = {host.name: {**common, "index": i} for i, host in enumerate(job.hosts)}
    source = Path(links.__file__).read_text(encoding="utf-8")
    # The scripts give up first, and say at what.
    answers = ask(source, requests, environment, seconds + 2, local=local)
    measured = {answer.host: Measured.of(answer.rows, answer.said) for answer in answers}
    lines = list(link_lines(job, measured, master, seconds))
    return lines, [{"host": name, **host.done} for name, host in measured.items() if host.done]


def _addresses(name: str) -> list[str]:
    try:
        return socket.gethostbyname_ex(name)[2]
    except OSError:
        return []


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _port(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"expected a port, 1 to 65535, found {text}")
    return int(text)


def _seconds(text: str) -> float:
    value = float(text)
    if not 1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"expected 1 to 3600 seconds, found {text}")
    return value
