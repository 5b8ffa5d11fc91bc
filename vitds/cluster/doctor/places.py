"""Whether every host sees the same output directory and the same data."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from vitds.cluster.doctor.comparing import Facts, Job, alike, on
from vitds.cluster.doctor.table import WARNING, WRONG, Line, ranges


def output_lines(job: Job, facts: Facts) -> Iterator[Line]:
    """Each host left a file there; each must see the files of all."""
    if job.output is None:
        return
    left = {host: known["output"] for host, known in facts.items()}
    groups: dict[frozenset[str], list[str]] = {}
    for host, place in left.items():
        directory = shlex.quote(place["directory"])
        if "error" in place:
            message = f"{host}: --output-dir: {place['directory']} cannot be written: {place['error']}"
            fix = on([host], f"ls -ld {directory}; findmnt -T {directory}; id")
            yield Line("output", f"{place['error']}", (host,), WRONG, message, fix)
        elif facts[host].get("seen") is None:
            yield Line("output", "no answer", (host,), WRONG, f"{host}: --output-dir: it does not say what it sees there", on([host], f"ls {directory}"))  # fmt: skip
        else:
            groups.setdefault(frozenset(facts[host]["seen"]), []).append(host)
    if not groups:
        return
    right = max(groups, key=lambda seen: len(groups[seen]))
    others = groups.pop(right)
    lost = [host for host in others if left[host]["path"] not in right]
    yield Line(
        "output", f"{left[others[0]]['directory']} is shared", tuple(host for host in others if host not in lost)
    )
    alone = lost + [host for seen, hosts in groups.items() for host in hosts]
    if alone:
        directory = left[alone[0]]["directory"]
        message = f"{ranges(alone)}: --output-dir: {directory} is not what it is on {others[0]}: one does not see the other's files"
        compared = on(list(dict.fromkeys([others[0], *alone]))[:8], f"findmnt -T {shlex.quote(directory)}")
        fix = f"mount the shared file system there; compare {compared}"
        yield Line("output", f"{directory} is another", tuple(alone), WRONG, message, fix)


def data_lines(job: Job, facts: Facts) -> Iterator[Line]:
    """The same names and sizes on every host."""
    for key in next(iter(facts.values()))["data"]:
        found = {host: known["data"][key] for host, known in facts.items()}
        for host, data in found.items():
            if "error" in data:
                path = shlex.quote(data["error"].rpartition(": ")[0])
                message, fix = f"{host}: {key}: {data['error']}", on([host], f"ls -ld {path}; findmnt -T {path}")
                yield Line(key, data["error"], (host,), WRONG, message, fix)

            if "slow" in data:
                yield Line(
                    key, data["slow"], (host,), WARNING, f"{host}: {key}: {data['slow']}, so it was not compared"
                )

        def wrong(hosts: tuple[str, ...], value: str, right: str, other: str, key: str = key) -> tuple[str, str]:
            return (
                f"{key}: {value} on {ranges(hosts)}, {right} on {other}",
                "copy it again, or mount the same file system",
            )

        texts = {
            host: f"{data['entries']} entries, {data['digest']}" for host, data in found.items() if "digest" in data
        }
        yield from alike(key, texts, wrong)
