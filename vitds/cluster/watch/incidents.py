"""What happened to a job, judged from the reports of the ranks that can still write one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch.distributed as group

from vitds.cluster.watch.stacks import frames_of_error, standing
from vitds.errors import Preempted, Stopped, UserError

Report = Mapping[str, Any]
"""A rank's state. rank, host, step, beats, phase · seconds: since its last beat · left: until its bound, s, or None for
never · place, collective: of its main thread (`Standing`) · error: one line, or None · connection: whether the error is
of a connection · refused: whether it is the user's · gone: ranks of its own host whose processes have ended."""

_LOST_CONNECTION = (
    "connection closed by peer", "connection reset", "connection refused", "broken pipe", "timed out", "socket timeout",
    "remote process exited", "nccl error", "nccl communicator", "gloo/transport", "failed to recv", "failed to send",
)  # fmt: skip
_HOSTS_NAMED = 8


def is_agreed(error: BaseException) -> bool:
    """Whether an error is one that every rank has raised, or a person's Ctrl-C: no incident."""
    if isinstance(error, UserError):
        return error.agreed
    return isinstance(error, (Preempted, Stopped, KeyboardInterrupt))


def is_of_a_connection(error: BaseException) -> bool:
    """Whether an error says no more than that another rank could not be reached."""
    kinds = [getattr(group, name, None) for name in ("DistBackendError", "DistNetworkError", "DistStoreError")]
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, tuple(kind for kind in kinds if kind is not None)):
            return True
        if isinstance(seen, (RuntimeError, OSError)):
            words = str(seen).lower()
            if isinstance(seen, RuntimeError) and any(word in words for word in _LOST_CONNECTION):
                return True
            if standing(frames_of_error(seen.__traceback__)).collective and _is_torchs(seen):
                return True
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return False


def one_line(error: BaseException) -> str:
    """Type and message; the message's first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def can_be_judged(reports: Mapping[int, Report], world_size: int, patience_is_over: bool) -> bool:
    """Whether these reports are all that will come, and say that something is wrong.

    Args:
        reports: by rank, those that are still kept up to date.
        world_size: ranks there should be.
        patience_is_over: ranks that have not reported have had their time.
    """
    wrong = any(report["error"] or report["gone"] for report in reports.values())
    over = any(report["left"] is not None and report["left"] <= 0 for report in reports.values())
    if not wrong and not over:
        return False
    # A rank in a longer phase than the others', a save perhaps, may yet arrive.
    if not wrong and any(report["left"] is not None and report["left"] > 0 for report in reports.values()):
        return False
    missing = set(range(world_size)) - set(reports)
    return patience_is_over or missing <= _gone(reports)


def judge(reports: Mapping[int, Report], hosts: Sequence[str], directory: str) -> dict[str, Any]:
    """The incident (docs/design.md §3.8) that these reports make.

    The cause is the first of: ranks with an error of their own; ranks that do not report; ranks that are behind, or
    outside a collective in which the others wait. Nobody is named where nothing tells the ranks apart.

    Args:
        reports: by rank; at least one.
        hosts: of all ranks, in rank order.
        directory: where the reports are.
    """
    first = reports[min(reports)]
    step = max(report["step"] for report in reports.values())
    silent = [rank for rank in range(len(hosts)) if rank not in reports]
    crashed = [rank for rank in sorted(reports) if reports[rank]["error"] and not reports[rank]["connection"]]
    lost = [rank for rank in sorted(reports) if reports[rank]["connection"]]
    at = f"at step {step} ({first['phase']})"
    if crashed:
        what, ranks = "crash", crashed
        lines = "; ".join(dict.fromkeys(reports[rank]["error"] for rank in crashed))
        message = f"{named(ranks, hosts)} ended {at} by {_its(ranks)} own error: {lines}"
    elif silent:
        what, ranks = "lost", silent
        gone = _gone(reports) & set(silent)
        why = (
            "killed, or ended without a word"
            if gone == set(silent)
            else "dead, frozen, cut off or stuck in native code"
        )
        message = f"{named(ranks, hosts)} gave no sign of life {at}: {why}{_others(reports, hosts, silent)}"
    else:
        what, ranks = "lost" if lost else "hang", _late(reports)
        seconds = max(report["seconds"] for report in reports.values())
        if ranks:
            places = "; ".join(dict.fromkeys(str(reports[rank]["place"]) for rank in ranks))
            alone = len(hosts) == 1
            verb = "made no progress" if alone else "did not arrive"
            message = f"{named(ranks, hosts)} {verb} {at} for {seconds:.0f} s, and {_stands(ranks)} at {places}"
            message += _others(reports, hosts, ranks)
        elif lost:
            message = f"{named(lost, hosts)} lost {_its(lost)} connections {at}, and every rank is alive: {reports[lost[0]]['error']}"
        else:
            standings = Counter(
                f"in {report['collective']}" if report["collective"] else f"at {report['place']}"
                for report in reports.values()
            )
            where = "; ".join(f"{count} {place}" for place, count in standings.most_common(3))
            if len(standings) == 1 and reports[0]["collective"] and len(set(hosts)) > 1:
                where += "; all are alive, so the network between these hosts, or a device, is stuck"
            message = f"no progress {at} for {seconds:.0f} s on {named(range(len(hosts)), hosts)}: {where}"
    found = {
        "what": what,
        "step": step,
        "ranks": list(ranks),
        "hosts": list(dict.fromkeys(hosts[rank] for rank in ranks)),
        "message": f"{message}. Stacks of all that could write them: {directory}",
        "reports": directory,
    }
    if crashed and all(reports[rank].get("refused") for rank in crashed):
        found |= {"what": "refused", "hosts": [], "exit_code": 2}  # a restart would be refused as well
    return found


def named(ranks: Collection[int], hosts: Sequence[str]) -> str:
    """`rank 3 on beta`, `ranks 0-2, 5 on alpha, ranks 8-15 on beta`."""
    by_host: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        by_host.setdefault(hosts[rank], []).append(rank)
    parts = [f"rank{'s' * (len(own) > 1)} {_ranges(own)} on {host}" for host, own in by_host.items()]
    more = len(parts) - _HOSTS_NAMED
    return ", ".join(parts[:_HOSTS_NAMED] + [f"and {more} more host{'s' * (more > 1)}"] * (more > 0))


def _late(reports: Mapping[int, Report]) -> list[int]:
    """Those who keep the others waiting, if that can be told."""
    if len(reports) == 1:
        return [] if next(iter(reports.values()))["connection"] else list(reports)
    here = {rank: report for rank, report in sorted(reports.items()) if not report["error"]}
    outside = [rank for rank, report in here.items() if not report["collective"]]
    if here and len({report["beats"] for report in reports.values()}) > 1:
        fewest = min(report["beats"] for report in reports.values())
        behind = [rank for rank, report in here.items() if report["beats"] == fewest]
        if behind and len(behind) < len(reports):
            return [rank for rank in behind if rank in outside] or behind
    if outside and len(outside) < len(reports):
        return outside
    if len(here) == len(reports) and not outside:
        places = Counter(report["collective"] for report in here.values()).most_common()
        if len(places) > 1 and places[0][1] > places[1][1]:
            return [rank for rank, report in here.items() if report["collective"] != places[0][0]]
    return []


def _others(reports: Mapping[int, Report], hosts: Sequence[str], ranks: Collection[int]) -> str:
    """What those who are not at fault were doing."""
    rest = {rank: report for rank, report in reports.items() if rank not in ranks}
    places = Counter(report["collective"] for report in rest.values() if report["collective"]).most_common(2)
    if not places:
        return ""
    seconds = max(report["seconds"] for report in rest.values())
    where = " and ".join(place for place, _ in places)
    verb = "was" if len(rest) == 1 else "were"
    return f"; for {seconds:.0f} s {named(rest, hosts)} {verb} in {where}"


def _gone(reports: Mapping[int, Report]) -> set[int]:
    return {rank for report in reports.values() for rank in report["gone"]}


def _ranges(ranks: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][1] == rank - 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _its(ranks: Sequence[int]) -> str:
    return "its" if len(ranks) == 1 else "their"


def _stands(ranks: Sequence[int]) -> str:
    return "stands" if len(ranks) == 1 else "stand"


def _is_torchs(error: BaseException) -> bool:
    """Whether it was raised inside torch's or DeepSpeed's communication, not by what they call."""
    frames = frames_of_error(error.__traceback__)
    return bool(frames) and any(part in frames[-1].file for part in ("/torch/distributed/", "/deepspeed/comm/"))
