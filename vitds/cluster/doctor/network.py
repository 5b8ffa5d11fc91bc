"""What the doctor makes of interfaces, and of the measured links (vitds/cluster/doctor/links.py)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vitds.cluster.doctor.comparing import Facts, Job, on
from vitds.cluster.doctor.table import GOOD, WARNING, WRONG, Line, ranges

FACTOR = 3.0
"""A pair or host this many times slower than the median is named."""
SLOWEST_TRIP = 0.01
"""A round trip in s that no network of one cluster takes, even between busy hosts: Ethernet's is below 0.0005."""
FASTER_TRIP = 0.0005
"""Round trips below this are not compared: they are the hosts' own haste."""
LEAST_BANDWIDTH = 50e6
"""Bytes/s: half of what Gigabit Ethernet carries. ZeRO sends several times the model's bytes a step."""
STAGES = ("start", "connect", "group", "pair", "all-reduce", "done")


def interface_lines(job: Job, facts: Facts) -> Iterator[Line]:
    """Every host must listen where the others can reach it; gloo is used beside NCCL too."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for host, known in facts.items():
        groups.setdefault(_interface(known, len(job.hosts) > 1), []).append(host)
    for (text, state, message, fix), hosts in groups.items():
        yield Line("interface", text, tuple(hosts), state, f"{ranges(hosts)}: {message}" if message else "", fix)
    unknown = {
        host: [peer for peer, way in known["routes"].items() if not way and peer in facts]
        for host, known in facts.items()
    }
    for host, peers in unknown.items():
        if peers:
            message = f"{host}: the name{'s' * (len(peers) > 1)} {ranges(peers)} cannot be resolved there"
            fix = on([host], f"getent hosts {' '.join(peers[:8])}") + "; add them to DNS or /etc/hosts"
            yield Line("interface", f"does not know {ranges(peers)}", (host,), WARNING, message, fix)
    if job.first in facts and (addresses := facts[job.first]["addresses"]):
        ways = {known["routes"].get(job.first, [""])[0] for known in facts.values() if known["routes"].get(job.first)}
        if ways and addresses[0] not in ways:
            message = (
                f"{job.first}: DeepSpeed takes the first of `hostname -I`, {addresses[0]}, for the master's address; "
            )
            message += f"the others know it as {', '.join(sorted(ways))}"
            fix = f"deepspeed --master_addr {min(ways)} …"
            yield Line("interface", f"master is {addresses[0]}", (job.first,), WARNING, message, fix)


def missing_interfaces(variable: str, value: str, interfaces: Sequence[str]) -> list[str]:
    """The interfaces that a variable names and this host does not have.

    GLOO_SOCKET_IFNAME is a list of names; NCCL_SOCKET_IFNAME one of beginnings, or after `=` of names, or after `^` of
    what is left out (NVIDIA's NCCL documentation).
    """
    if variable.startswith("NCCL"):
        if value.startswith("^"):
            return []
        exact = value.startswith("=")
        wanted = value.removeprefix("=").split(",")
        if any(name == want or (not exact and name.startswith(want)) for want in wanted for name in interfaces):
            return []
        return wanted
    return [name for name in value.split(",") if name not in interfaces]


def _interface(known: Mapping[str, Any], several: bool) -> tuple[str, str, str, str]:
    """(answer, state, message, fix) of one host."""
    own = {address: name for name, addresses in known["interfaces"].items() for address in addresses}
    used = sorted({own[way[1]] for way in known["routes"].values() if way and way[1] in own} - {"lo"})
    best = used[0] if used else next((name for name in own.values() if name != "lo"), "NAME")
    set_here = {name: value for name, value in known["environ"].items() if name.endswith("_SOCKET_IFNAME")}
    for variable, value in set_here.items():
        if missing := missing_interfaces(variable, value, list(known["interfaces"])):
            message = (
                f"{variable}={value}, but there is no {', '.join(missing)}; there are {', '.join(known['interfaces'])}"
            )
            return f"no {', '.join(missing)}", WRONG, message, f"write {variable}={best} into .deepspeed_env"
    gloo = set_here.get("GLOO_SOCKET_IFNAME")
    if not several:
        return best, GOOD, "", ""
    if gloo is None and (known["own_address"].startswith("127.") or known["own_address"] not in own):
        where = known["own_address"] or "nothing"
        message = f"its own name stands for {where}, where gloo would listen and no other host can reach it"
        return f"listens on {where}", WRONG, message, f"echo GLOO_SOCKET_IFNAME={best} >> .deepspeed_env"
    name = gloo or own[known["own_address"]]
    if used and name.split(",")[0] not in used:
        message = f"gloo uses {name}, but the way to the other hosts is {', '.join(used)}"
        return f"{name}, not {used[0]}", WARNING, message, f"write GLOO_SOCKET_IFNAME={best} into .deepspeed_env"
    return name, GOOD, "", ""


@dataclass
class Measured:
    """What one host said while the links were measured."""

    stage: str = ""
    other: int | None = None
    error: str = ""
    done: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], said: str) -> Measured:
        """From its rows and the last line of its errors."""
        found = cls()
        for row in rows:
            found.stage, found.other = row.get("stage", found.stage), row.get("other")
            found.error = row.get("error", found.error)
        found.error = found.error or (said if found.stage != "done" else "")
        found.done = rows[-1] if found.stage == "done" else {}
        return found


def link_lines(job: Job, measured: Mapping[str, Measured], master: str, seconds: float) -> Iterator[Line]:
    """From what each host measured, or from how far it got."""
    if all(host.done for host in measured.values()):
        yield from _speeds(list(measured), [host.done for host in measured.values()])
        return
    places = {name: STAGES.index(host.stage) if host.stage in STAGES else -1 for name, host in measured.items()}
    last = min(places.values())
    behind = [name for name, place in places.items() if place == last]
    stage = STAGES[last] if last >= 0 else ""
    error = next((measured[name].error for name in behind if measured[name].error), f"not within {seconds:.0f} s")
    whose = ranges(behind)
    if stage == "connect" and job.first in behind:
        behind, whose = [job.first], job.first
        error = measured[job.first].error or error
        message, fix = f"{whose} cannot listen on port {job.port}: {error}", on(behind, f"ss -ltnp sport = :{job.port}")
    elif stage == "connect":
        message = f"{whose} cannot reach {job.first} at {master} port {job.port}: {error}"
        fix = f"open port {job.port} between the hosts; try: " + on(behind, f"nc -vz -w 5 {master} {job.port}")
    elif stage == "group":
        message = f"{whose} met, but cannot open connections to each other: {error}"
        fix = "set GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME) in .deepspeed_env; open all ports between the hosts"
    elif stage == "pair":
        names = list(measured)
        others = {names[o] for name in behind if (o := measured[name].other) is not None}
        message = f"{whose} and {ranges(sorted(others - set(behind))) or 'each other'}: the link between them is dead: {error}"
        fix = on(behind[:1], f"ping -c 3 {next(iter(others), job.first)}")
    else:
        message, fix = f"{whose}: the links cannot be measured: {error}", "vitds doctor --no-links …"
    yield Line("links", f"stuck at {stage or 'the start'}", tuple(behind), WRONG, message, fix)


def _speeds(names: Sequence[str], done: Sequence[Mapping[str, Any]]) -> Iterator[Line]:
    pairs = [(int(i), int(j), float(trip), float(speed)) for row in done for i, j, trip, speed in row["pairs"]]
    if pairs:
        trips = {(i, j): trip for i, j, trip, _ in pairs}
        middle = statistics.median(trips.values())
        bound = min(SLOWEST_TRIP, max(FASTER_TRIP, FACTOR * middle))
        slow = [pair for pair, trip in trips.items() if trip > bound]
        shown = f"{_ms(middle)}" + (
            f" ({_ms(min(trips.values()))} to {_ms(max(trips.values()))})" if len(pairs) > 1 else ""
        )
        yield from _outliers(
            "latency", names, trips, slow, shown, f"a round trip takes {{}}; the bound is {_ms(bound)}", _ms
        )
        speeds = {(i, j): speed for i, j, _, speed in pairs}
        middle = statistics.median(speeds.values())
        bound = max(LEAST_BANDWIDTH, middle / FACTOR)
        slow = [pair for pair, speed in speeds.items() if speed < bound]
        shown = _gb(middle) + (
            f" ({_gb(min(speeds.values()))} to {_gb(max(speeds.values()))})" if len(pairs) > 1 else ""
        )
        text = f"TCP carries {{}}; the least is {_gb(bound)}"
        yield from _outliers("bandwidth", names, speeds, slow, shown, text, _gb)
    own = {i: float(row["own"]) for i, row in enumerate(done) if row["own"]}
    if own:
        middle = statistics.median(own.values())
        slow_hosts = [names[i] for i, speed in own.items() if speed < middle / FACTOR]
        yield Line(
            "all-reduce", f"{_gb(middle)} inside a host", tuple(names[i] for i in own if names[i] not in slow_hosts)
        )
        for i, speed in own.items():
            if names[i] in slow_hosts:
                message = f"{names[i]}: an all-reduce inside it reaches {_gb(speed)}, elsewhere {_gb(middle)}"
                yield Line("all-reduce", _gb(speed), (names[i],), WRONG, message, on([names[i]], "nvidia-smi topo -m"))
    overall = [float(row["all"]) for row in done if row["all"]]
    if overall:
        yield Line("all-reduce", f"{_gb(min(overall))} over all ranks", tuple(names))


def _outliers(
    check: str, names: Sequence[str], values: Mapping[tuple[int, int], float], slow: Sequence[tuple[int, int]],
    shown: str, text: str, unit: Any,
) -> Iterator[Line]:  # fmt: skip
    """A host with more than half of its links slow is named itself, other slow links as pairs."""
    left, hosts = set(slow), list[int]()
    while len(names) > 2 and left:
        count, worst = max((sum(i in pair for pair in left), -i) for i in range(len(names)))
        if count <= (len(names) - 1) / 2:
            break
        hosts.append(-worst)
        left = {pair for pair in left if -worst not in pair}
    at_fault = {names[i] for i in hosts} | ({names[i] for pair in left for i in pair} if len(names) > 2 else set())
    if len(names) > 2 or not slow:
        yield Line(check, shown, tuple(name for name in names if name not in at_fault))
    for i in hosts:
        value = statistics.median(value for pair, value in values.items() if i in pair)
        fix = on([names[i]], "ethtool -S eth0; ip -s link; tc qdisc")
        yield Line(check, unit(value), (names[i],), WRONG, f"{names[i]}: to the others {text.format(unit(value))}", fix)
    for i, j in sorted(left):
        value, whose = values[i, j], (names[i], names[j])
        fix = on([names[i]], f"ping -c 10 {names[j]}") + "; " + on([names[j]], "ip -s link; tc qdisc")
        yield Line(check, unit(value), whose, WRONG, f"{whose[0]} and {whose[1]}: {text.format(unit(value))}", fix)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _gb(speed: float) -> str:
    return f"{speed / 1e9:.3g} GB/s" if speed >= 1e8 else f"{speed / 1e6:.3g} MB/s"
