"""What the doctor's checks are made with: the job, the facts of its hosts, and what most of them agree on."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitds.cluster.doctor.table import GOOD, WRONG, Line, ranges
from vitds.cluster.hostfile import Host


@dataclass(frozen=True)
class Job:
    """What is to be started."""

    hosts: tuple[Host, ...]
    port: int
    config: str | None = None
    output: str | None = None
    directory: str = "."

    @property
    def first(self) -> str:
        """The host of rank 0."""
        return self.hosts[0].name

    @property
    def world_size(self) -> int:
        """Ranks."""
        return sum(host.slots for host in self.hosts)


Facts = Mapping[str, Mapping[str, Any]]
"""{host: its facts}, in the hostfile's order; only hosts that have answered."""


def on(hosts: Sequence[str], command: str) -> str:
    """The shell command that runs `command` on these hosts."""
    if len(hosts) == 1:
        return f"ssh {hosts[0]} {shlex.quote(command)}"
    return f"pdsh -R ssh -w {shlex.quote(ranges(hosts))} {shlex.quote(command)}"


def alike(
    name: str, values: Mapping[str, str], wrong: Callable[[tuple[str, ...], str, str, str], tuple[str, str]]
) -> Iterator[Line]:
    """One line per value; the one of most hosts (of the first, where there are as many) is right.

    Args:
        values: {host: value}; hosts that are not there have nothing to compare.
        wrong: (hosts, their value, the right value, a host that has it) -> (message, fix).
    """
    groups: dict[str, list[str]] = {}
    for host, value in values.items():
        groups.setdefault(value, []).append(host)
    if not groups:
        return
    right = max(groups, key=lambda value: len(groups[value]))
    for value, hosts in sorted(groups.items(), key=lambda item: item[0] != right):
        message, fix = wrong(tuple(hosts), value, right, groups[right][0]) if value != right else ("", "")
        yield Line(name, value, tuple(hosts), WRONG if message else GOOD, message, fix)


def data_paths(resolved: Mapping[str, Any]) -> dict[str, str]:
    """{key: path} of what a resolved run file reads from disk."""
    part = resolved.get("vitds", {})
    data = part.get("data", {})
    found = {f"vitds.data.{role}.path": (data.get(role) or {}).get("path") for role in ("train", "eval")}
    found["vitds.init_from.path"] = (part.get("init_from") or {}).get("path")
    return {key: path for key, path in found.items() if path}
