"""What a training checks of its hosts by itself: the doctor in short, in well under a second."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vitds import dist
from vitds.cluster.doctor import probe
from vitds.cluster.doctor.checks import HOST_CHECKS, START_CHECKS
from vitds.cluster.doctor.comparing import Facts, Job, data_paths
from vitds.cluster.doctor.network import missing_interfaces
from vitds.cluster.doctor.table import WRONG, Line
from vitds.cluster.hostfile import Host, read_hostfile
from vitds.cluster.supervise.launcher import Launcher
from vitds.errors import UserError
from vitds.interruption import command_line, parent_of
from vitds.json_files import say, walk

SEE_SECONDS = 5.0
"""How long a file server may take to show a host what rank 0 has written."""
_MOST_KEYS = 5


def several_hosts(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher has started ranks on other hosts, too, by what it has told this one."""
    ranks = environ.get("WORLD_SIZE", "1")
    return int(ranks) > int(environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or ranks)


def early_checks(environ: Mapping[str, str] = os.environ) -> None:
    """Before the process group is made: what would hang it in silence. No communication.

    A lock that a build of one of DeepSpeed's operators has left behind, at which every later start that needs it waits
    for ever, is removed where nobody can own it any more; where somebody on another host may, it is named.

    Args:
        environ: the environment, with the launcher's variables.

    Raises:
        UserError: the hostfile that `deepspeed` was given is not there, and it has started this host alone; in a job of
            several hosts, an interface named for gloo or NCCL is not there.
    """
    if not several_hosts(environ):
        _refuse_missing_hostfile()
    else:
        there = probe.interfaces()
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            if variable in environ and (missing := missing_interfaces(variable, environ[variable], list(there))):
                shown = ", ".join(f"{name} ({', '.join(own) or 'no address'})" for name, own in there.items())
                raise UserError(
                    f"{variable}={environ[variable]}: {socket.gethostname()} has no interface {', '.join(missing)}; "
                    f"it has {shown}; write the right one into .deepspeed_env"
                )
    for lock in probe.jit_locks():
        if lock["holder"] is not None:
            continue
        lock = probe.remove_if_stale(lock)
        if lock["removed"]:
            say(f"vitds: {lock['path']} removed: the build that left it is no longer alive")
        elif os.path.exists(lock["path"]) and environ.get("LOCAL_RANK", "0") == "0":
            say(
                f"vitds: warning: {lock['path']}, unchanged for {lock['idle']:.0f} s, belongs to no process of "
                f"{socket.gethostname()}; if no other host is building, a start may wait for it for ever; "
                f"fix: rm {shlex.quote(lock['path'])}"
            )


def _refuse_missing_hostfile() -> None:
    ancestor = parent_of(os.getpid())
    while ancestor:
        given = Launcher(command_line(ancestor)).options.get("--hostfile")
        if given is not None:
            with suppress(OSError):  # another user's process does not say where it is
                given = os.path.join(os.readlink(f"/proc/{ancestor}/cwd"), given)
            if not os.path.isfile(given):
                read_hostfile(given)
            return
        ancestor = parent_of(ancestor)


def preflight(output: Path, resolved: Mapping[str, Any], images: Mapping[str, Mapping[str, Any]]) -> None:
    """Whether the hosts of this job can train together; the first rank of each speaks for it. Collective.

    Rank 0 prints one line for what only may hurt.

    Args:
        output: the run's directory; rank 0 can write there.
        resolved: the resolved run file.
        images: by role, the number and the digest of this rank's images (vitds.data.Sources.identity).

    Raises:
        UserError: on every rank: hosts differ in versions, in vitds itself, in the run file or in the data; the output
            directory is not one directory; too few open files are allowed.
    """
    own = probe.identity()
    cards = dist.all_objects(((own["hostname"], own["machine"]), images))
    machines = [machine for machine, _ in cards]
    first = [machines.index(machine) for machine in machines]  # of each rank's host
    before = time.time()
    token = dist.broadcast_object(dist.together(lambda: _leave_token(output) if dist.is_main() else ""))
    alone = len(set(first)) == 1
    mine = None
    if first[dist.rank()] == dist.rank():
        mine = dist.together(lambda: _facts(output, resolved, token, alone=alone))
    else:
        dist.together(lambda: None)
    gathered = dist.all_objects((mine, before, time.time()))
    if dist.is_main():
        with suppress(OSError):
            (output / token).unlink()
    names = {rank: _name(machines, rank) for rank in sorted(set(first))}
    _, started, ended = gathered[0]
    facts = {name: {**gathered[rank][0]} for rank, name in names.items()}
    for known in facts.values():
        known["clock"] = (known["time"] - ended, known["time"] - started)
    job = Job(tuple(Host(name, first.count(rank)) for rank, name in names.items()), port=0, output=str(output))
    lines = [line for part in (HOST_CHECKS if alone else START_CHECKS) for line in part(job, facts)] + list(
        _output(job, facts)
    )
    if len({known["run_file"] for known in facts.values()}) > 1:  # the same on every rank
        files = dist.all_objects(_leaves(resolved) if mine is not None else None)
        lines += _run_files({name: files[rank] for rank, name in names.items()})
    lines += _images([seen for _, seen in cards], lambda rank: _name(machines, rank))
    wrong = [
        f"{line.message}\n    fix: {line.fix}" if line.fix else line.message for line in lines if line.state == WRONG
    ]
    if wrong:
        raise UserError("these hosts cannot train together\n" + "\n".join(wrong))
    if dist.is_main():
        for line in lines:
            if line.message:
                say(f"vitds: warning: {line.message}" + (f"; fix: {line.fix}" if line.fix else ""))


def _facts(output: Path, resolved: Mapping[str, Any], token: str, *, alone: bool) -> dict[str, Any]:
    """Of this host, in the probe's words; what can only differ between hosts is not looked at where there is one."""
    return {
        "time": time.time(),
        "limits": probe.limits(),
        "shm": probe.shared_memory(),
        "run_file": _digest(resolved),
        "seen": alone or bool(probe.look([str(output / token)], SEE_SECONDS)),
        "python": [platform.python_version(), sys.executable],
        "packages": {name: None if alone else probe.version(name) for name in probe.PACKAGES},
        "sources": None if alone else probe.sources(),
        "data": {} if alone else {key: probe.digest_of_data(path) for key, path in data_paths(resolved).items()},
    }


def _leave_token(output: Path) -> str:
    token = f".vitds-start-{secrets.token_hex(4)}"
    (output / token).touch()
    return token


def _name(machines: list[tuple[str, str]], rank: int) -> str:
    """The host's name; where two machines have one, with its first rank."""
    name = machines[rank][0]
    return name if len({machine for machine in machines if machine[0] == name}) == 1 else f"{name}(rank {rank})"


def _output(job: Job, facts: Facts) -> Iterator[Line]:
    for host, known in facts.items():
        if not known["seen"]:
            message = f"{host}: --output-dir {job.output} is not what it is on {job.first}: what rank 0 wrote there is not seen"
            yield Line("output", "not shared", (host,), WRONG, message, f"mount the shared file system there, or on {host}: findmnt -T {shlex.quote(str(job.output))}")  # fmt: skip


def _images(seen: Sequence[Mapping[str, Mapping[str, Any]]], name: Callable[[int], str]) -> Iterator[Line]:
    """The first rank that has other images than rank 0, of each role: their streams would not be one."""
    for role, right in seen[0].items():
        rank = next((rank for rank, images in enumerate(seen) if images.get(role, right) != right), None)
        if rank is None:
            continue
        here, there = seen[rank][role]["images"], right["images"]
        counts = f"{here} images" + (
            f", {there} images on {name(0)}" if here != there else f", but not those of {name(0)}"
        )
        message = f"rank {rank} on {name(rank)}: vitds.data.{role} holds {counts}"
        fix = "give every host the same files, and start when nobody writes there any more"
        yield Line("images", "differ", (name(rank),), WRONG, message, fix)


def _digest(resolved: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(resolved, sort_keys=True, default=str).encode()).hexdigest()


def _leaves(resolved: Mapping[str, Any]) -> dict[str, str]:
    return {place: json.dumps(value) for place, value in walk(dict(resolved)) if not isinstance(value, (dict, list))}


def _run_files(files: Mapping[str, Mapping[str, str]]) -> Iterator[Line]:
    """Each key in which a host's run file is not the first host's, with both values."""
    (first, right), *others = files.items()
    for host, found in others:
        keys = [key for key in {**right, **found} if right.get(key) != found.get(key)]
        shown = "; ".join(
            f"{key} is {found.get(key, 'not set')}, {right.get(key, 'not set')} on {first}" for key in keys[:_MOST_KEYS]
        )
        more = f" (and {len(keys) - _MOST_KEYS} more)" if len(keys) > _MOST_KEYS else ""
        if keys:
            yield Line(
                "config",
                "differs",
                (host,),
                WRONG,
                f"{host}: the run file differs: {shown}{more}",
                f"copy it from {first} to {host}",
            )
