"""From the facts of all hosts (vitds/cluster/doctor/probe.py) to what is wrong, whom it concerns and what mends it. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

from vitds.cluster.doctor.comparing import Facts, Job, alike, on
from vitds.cluster.doctor.network import interface_lines
from vitds.cluster.doctor.places import data_lines, output_lines
from vitds.cluster.doctor.probe import LOCK_IDLE_SECONDS
from vitds.cluster.doctor.table import GOOD, WARNING, WRONG, Line, ranges

CLOCK_SECONDS = (1.0, 30.0)
"""How far a clock may be off before it is mentioned, and before it is wrong: leases and bounds count in tens of seconds."""
SHM_BYTES = 72 << 20
"""What one rank may take of /dev/shm: DeepSpeed's CPU all-reduce 69 MB; NCCL and data workers are of that order."""
PACKAGES = ("torch", "deepspeed", "transformers", "safetensors", "numpy")


def check(job: Job, facts: Facts) -> list[Line]:
    """The lines of all checks, in the order of the table."""
    return [line for part in CHECKS for line in part(job, facts)] if facts else []


def _machines(job: Job, facts: Facts) -> Iterator[Line]:
    by_machine: dict[str, list[str]] = {}
    for host, known in facts.items():
        by_machine.setdefault(f"{known['hostname']} {known['machine']}", []).append(host)
    for names in by_machine.values():
        if len(names) > 1:
            own = facts[names[0]]["hostname"]
            message = f"{ranges(names)} are one machine ({own}): its accelerators would be used twice"
            yield Line("machine", f"all are {own}", tuple(names), WRONG, message, "keep one of them in the hostfile")


def _python(job: Job, facts: Facts) -> Iterator[Line]:
    def wrong(hosts: tuple[str, ...], value: str, right: str, other: str) -> tuple[str, str]:
        command = f"cd {shlex.quote(job.directory)} && make setup PYTHON=python{'.'.join(right.split('.')[:2])}"
        return f"Python {value} on {ranges(hosts)}, {right} on {other}", on(hosts, command)

    yield from alike("python", {host: known["python"][0] for host, known in facts.items()}, wrong)


def _packages(job: Job, facts: Facts) -> Iterator[Line]:
    for package in PACKAGES:

        def wrong(
            hosts: tuple[str, ...], value: str, right: str, other: str, package: str = package
        ) -> tuple[str, str]:
            executable = shlex.quote(facts[hosts[0]]["python"][1])
            if right == "missing":
                return f"{package} {value} on {ranges(hosts)}, but it is missing on {other}", ""
            fix = on(hosts, f"{executable} -m pip install {package}=={right}")
            return f"{package} {value} on {ranges(hosts)}, {right} on {other}", fix

        values = {host: known["packages"][package] or "missing" for host, known in facts.items()}
        if set(values.values()) == {"missing"}:
            fix = on(list(values), f"cd {shlex.quote(job.directory)} && make setup")
            yield Line(package, "missing", tuple(values), WRONG, f"{package} is missing on every host", fix)
        else:
            yield from alike(package, values, wrong)


def _sources(job: Job, facts: Facts) -> Iterator[Line]:
    texts = {host: _source_text(known["sources"]) for host, known in facts.items()}

    def wrong(hosts: tuple[str, ...], value: str, right: str, other: str) -> tuple[str, str]:
        there = (
            shlex.quote(PurePath(facts[other]["sources"]["from"]).as_posix() + "/") if right != "missing" else "vitds/"
        )
        own = facts[hosts[0]]["sources"]
        target = shlex.quote(own["from"] + "/") if own else there
        fix = "; ".join(f"rsync -a --delete {there} {host}:{target}" for host in hosts[:4])
        if other != job.first:
            fix = on([other], fix)
        place = f" (in {own['from']})" if own else ""
        return f"vitds is {value}{place} on {ranges(hosts)}, {right} on {other}", fix + (" …" if len(hosts) > 4 else "")

    if set(texts.values()) == {"missing"}:
        fix = on(list(texts), f"cd {shlex.quote(job.directory)} && make setup")
        yield Line("vitds", "missing", tuple(texts), WRONG, "vitds is missing on every host", fix)
    else:
        yield from alike("vitds", texts, wrong)


def _source_text(sources: Mapping[str, str] | None) -> str:
    return f"sources {sources['digest']}" if sources else "missing"


def _config(job: Job, facts: Facts) -> Iterator[Line]:
    def wrong(hosts: tuple[str, ...], value: str, right: str, other: str) -> tuple[str, str]:
        path = str(PurePath(job.directory, job.config or ""))
        source = shlex.quote(path if other == job.first else f"{other}:{path}")
        fix = "; ".join(f"scp {source} {host}:{shlex.quote(path)}" for host in hosts[:4])
        return f"--config is {value} on {ranges(hosts)}, {right} on {other}", fix + (" …" if len(hosts) > 4 else "")

    values = {host: str(known["config"]) for host, known in facts.items() if known["config"]}
    unreadable = {host: value for host, value in values.items() if ": " in value}
    if values and len(unreadable) == len(values):
        yield Line("config", "unreadable", tuple(values), WRONG, next(iter(values.values())), "")
    else:
        yield from alike("config", values, wrong)


def _accelerators(job: Job, facts: Facts) -> Iterator[Line]:
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    slots = {host.name: host.slots for host in job.hosts}
    for host, known in facts.items():
        groups.setdefault(_accelerator_state(known["accelerators"], slots[host], job), []).append(host)
    for (text, state, message, fix), hosts in groups.items():
        mend = on(hosts, fix) if fix.startswith("nvidia-smi") else fix
        yield Line("accelerators", text, tuple(hosts), state, f"{ranges(hosts)}: {message}" if message else "", mend)


def _accelerator_state(found: Mapping[str, Any], slots: int, job: Job) -> tuple[str, str, str, str]:
    if "error" in found:
        return "unknown", WRONG, f"accelerators cannot be counted: {found['error']}", "nvidia-smi -L"
    count = found["count"]
    if found["kind"] == "cpu":
        text = f"{count} CPU cores, slots={slots}"
        if slots > count:
            return (
                text,
                WARNING,
                f"slots={slots} in the hostfile, for {count} CPU cores",
                f"write slots={count} in the hostfile",
            )
        return text, GOOD, "", ""
    text = f"{count}, slots={slots}"
    if count < slots:
        fix = f"write slots={count} in the hostfile" if count else "nvidia-smi -L"
        return text, WRONG, f"slots={slots} in the hostfile, but there are {count} accelerators", fix
    if count > slots:
        return (
            text,
            WARNING,
            f"slots={slots} in the hostfile leaves {count - slots} of {count} accelerators idle",
            f"write slots={count} in the hostfile",
        )
    return text, GOOD, "", ""


def _clock(job: Job, facts: Facts) -> Iterator[Line]:
    groups: dict[tuple[str, str], list[str]] = {}
    for host, known in facts.items():
        low, high = known["clock"]  # the true difference lies between these
        off = max(low, 0.0) + min(high, 0.0)
        state = WRONG if abs(off) > CLOCK_SECONDS[1] else WARNING if abs(off) > CLOCK_SECONDS[0] else GOOD
        text = f"{off:+.1f} s" if state != GOOD else f"within {CLOCK_SECONDS[0]:.0f} s"
        groups.setdefault((text, state), []).append(host)
    for (text, state), hosts in groups.items():
        message = f"{ranges(hosts)}: the clock is {text} off" if state != GOOD else ""
        fix = on(hosts, "sudo chronyc makestep || sudo systemctl restart systemd-timesyncd") if message else ""
        yield Line("clock", text, tuple(hosts), state, message, fix)


def _port(job: Job, facts: Facts) -> Iterator[Line]:
    if job.first in facts:
        trouble = facts[job.first]["port"]
        if trouble is None:
            yield Line("port", f"{job.port} is free", (job.first,))
        else:
            message = f"{job.first}: port {job.port}, where the ranks are to meet: {trouble}"
            fix = f"deepspeed --master_port {job.port + 1} …; who has it: " + on(
                [job.first], f"ss -ltnp sport = :{job.port}"
            )
            yield Line("port", f"{job.port}: {trouble}", (job.first,), WRONG, message, fix)


def _limits(job: Job, facts: Facts) -> Iterator[Line]:
    needed = 256 + 4 * job.world_size  # connections to every rank in each of a few groups, and this process's own files
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for host, known in facts.items():
        files, locked = known["limits"]["nofile"], known["limits"]["memlock"]
        text = f"{files if files >= 0 else 'any number of'} open files"
        state, message, line = GOOD, "", ""
        if 0 <= files < needed:
            state, message = WRONG, f"{files} open files are allowed; {job.world_size} ranks need {needed}"
            line = f"* - nofile {max(65536, needed)}"
        elif known["limits"]["infiniband"] and locked >= 0:
            text += f", {locked >> 20} MiB locked"
            state, message = WARNING, f"{locked >> 20} MiB of locked memory are allowed; InfiniBand wants no limit"
            line = "* - memlock unlimited"
        groups.setdefault((text, state, message, line), []).append(host)
    for (text, state, message, line), hosts in groups.items():
        fix = on(hosts, f"echo {shlex.quote(line)} | sudo tee -a /etc/security/limits.d/90-vitds.conf") if line else ""
        yield Line("limits", text, tuple(hosts), state, f"{ranges(hosts)}: {message}" if message else "", fix)


def _shared_memory(job: Job, facts: Facts) -> Iterator[Line]:
    slots = {host.name: host.slots for host in job.hosts}
    fine, small = list[str](), dict[tuple[str, str], list[str]]()
    for host, known in facts.items():
        shm, needed = known["shm"], slots[host] * SHM_BYTES
        if "error" in shm:
            small.setdefault(("cannot be read", shm["error"]), []).append(host)
        elif shm["free"] < needed:
            text = f"{shm['free'] >> 20} of {shm['size'] >> 20} MiB free"
            small.setdefault((text, f"{text} in /dev/shm; {slots[host]} slots may want {needed >> 20} MiB"), []).append(
                host
            )
        else:
            fine.append(host)
        if shm.get("leftovers") and shm["left"] > min(shm["size"] / 4, shm["free"]):
            count, paths = len(shm["leftovers"]), " ".join(map(shlex.quote, shm["leftovers"]))
            message = f"{host}: {count} shared memory files of processes that have ended hold {shm['left'] >> 20} MiB"
            yield Line("/dev/shm", f"{count} left over", (host,), WARNING, message, on([host], f"rm {paths}"))
    if fine:
        yield Line("/dev/shm", "has room", tuple(fine))
    for (text, message), hosts in small.items():
        fix = on(hosts, "sudo mount -o remount,size=50% /dev/shm") + "  (a container: start it with --shm-size)"
        yield Line("/dev/shm", text, tuple(hosts), WARNING, f"{ranges(hosts)}: {message}", fix)


def _locks(job: Job, facts: Facts) -> Iterator[Line]:
    held = {lock["path"] for known in facts.values() for lock in known["locks"] if lock["holder"] is not None}
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for host, known in facts.items():
        for lock in known["locks"]:
            path = lock["path"]
            name, fix = PurePath(path).parent.name, f"rm {shlex.quote(path)}"
            if lock.get("removed"):
                found = (f"{name}: removed", GOOD, "", "")
            elif path in held:
                found = (f"{name}: in the making", GOOD, "", "")
            elif lock["idle"] > LOCK_IDLE_SECONDS:
                message = f"{path} belongs to no living process: every start that needs it would wait for ever"
                found = (f"{name}: stale", WRONG, message, fix)
            else:
                message = f"{path}, {lock['idle']:.0f} s old, belongs to no process of this host; a start waits for it"
                found = (f"{name}: perhaps stale", WARNING, message, fix)
            groups.setdefault(found, []).append(host)
    free = [host for host, known in facts.items() if not known["locks"]]
    if free:
        yield Line("JIT locks", "none", tuple(free))
    for (text, state, message, fix), hosts in groups.items():
        mend = f"{on(hosts, fix)}, or vitds doctor --fix" if fix else ""
        yield Line("JIT locks", text, tuple(hosts), state, f"{ranges(hosts)}: {message}" if message else "", mend)


CHECKS: tuple[Callable[[Job, Facts], Iterator[Line]], ...] = (
    _machines, _python, _packages, _sources, _config, _accelerators, _clock, _port, interface_lines, output_lines,
    data_lines, _limits, _shared_memory, _locks,
)  # fmt: skip
"""What the doctor checks, in the order of its table."""
HOST_CHECKS: tuple[Callable[[Job, Facts], Iterator[Line]], ...] = (_limits, _shared_memory)
"""What a training checks when it starts on one host."""
START_CHECKS = (_python, _packages, _sources, _clock, data_lines, *HOST_CHECKS)
"""What it checks on several."""
