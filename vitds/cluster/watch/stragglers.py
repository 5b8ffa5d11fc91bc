"""Which rank the others wait for: every rank's own times, compared every few steps.

A step takes equally long on all ranks, for they wait for each other in it. What tells them apart is work in which a rank
waits for nobody: fetching a batch, and the forward pass. (Under ZeRO-3 the forward pass gathers weights, so that there the
slowest rank has the shortest wait; only fetching is judged then.) The backward pass waits for the others' gradients; its
times are shown, and not judged.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch

from vitds import dist
from vitds.cluster.section import ClusterSection
from vitds.json_files import say

MATTERS = 0.05
"""A rank is named only if it would save the others this part of a step."""
LEAST_SECONDS = 1e-3
"""Differences below this are the operating system's."""
PARTS = ("data", "forward", "backward")


class Timer:
    """Adds up the seconds of the blocks it is entered for. On a GPU these are the device's, and nothing waits for it.

    Args:
        device: whose time it is; None: the host's.
    """

    def __init__(self, device: torch.device | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._on_device = device is not None and device.type == "cuda"
        self._clock = clock
        self._begin: Any = None
        self._sum = 0.0
        self._pending: deque[tuple[Any, Any]] = deque()

    def __enter__(self) -> None:
        self._begin = self._mark() if self._on_device else self._clock()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self._on_device:
            self._sum += self._clock() - self._begin
            return
        self._pending.append((self._begin, self._mark()))
        # In order on one stream: the first that is not done is where the device is.
        while self._pending and self._pending[0][1].query():
            begin, end = self._pending.popleft()
            self._sum += begin.elapsed_time(end) / 1e3

    def take(self) -> float:
        """Seconds since the last call; on a GPU without what has not been done yet, which the next call has."""
        taken, self._sum = self._sum, 0.0
        return taken

    @staticmethod
    def _mark() -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


class Stragglers:
    """The times of this rank's training loop.

    Its timers are entered around what they measure; each costs about a microsecond, on a GPU some.

    Args:
        section: the run file's `vitds.cluster`.
        device: of this rank.
        zero_stage: decides in which parts a rank can be called slow.
    """

    def __init__(self, section: ClusterSection, device: torch.device, zero_stage: int = 0) -> None:
        self._section, self._judged = section, ("data",) if zero_stage == 3 else ("data", "forward")
        self.data, self.forward, self.backward = Timer(), Timer(device), Timer(device)
        self._intervals: list[float] = []
        self._last: float | None = None
        self._steps = 0
        self._hosts: list[str] | None = None
        self._named: set[tuple[int, str]] = set()

    def compare(self, step: int, event: Callable[..., None]) -> dict[str, float]:
        """Called after each step. Every `straggler_every_steps` steps collective: the metrics of all ranks; otherwise,
        and in a world of one, none.

        Args:
            step: updates made; the same on all ranks.
            event: told of each slow rank as `event("straggler", **what)`; the console hears of it once.
        """
        now = time.perf_counter()
        if self._last is not None:
            self._intervals.append(now - self._last)
        self._last = now
        self._steps += 1
        every = self._section.straggler_every_steps
        if dist.world_size() == 1 or not every or step % every:
            return {}
        own = {part: getattr(self, part).take() / self._steps for part in PARTS}
        # The median: evaluations and saves lie between some steps.
        own["step"] = statistics.median(self._intervals) if self._intervals else 0.0
        self._steps, self._intervals = 0, []
        if self._hosts is None:
            self._hosts = dist.all_objects(socket.gethostname())
        times = dist.all_objects(own)
        for slow in stragglers(times, self._hosts, self._section.straggler_factor, self._judged):
            event("straggler", step=step, **slow)
            if dist.is_main() and (slow["rank"], slow["what"]) not in self._named:
                self._named.add((slow["rank"], slow["what"]))
                say(
                    f"vitds: rank {slow['rank']} on {slow['host']} is slow: {slow['what']} takes {slow['seconds']:.3g} s a "
                    f"step, the ranks' median {slow['median']:.3g} s; all others wait for it"
                )
        return row(times)


def row(times: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of one comparison: median and longest seconds per step of every part, and the rank whose own work takes longest.

    Args:
        times: seconds per step by part, of every rank.
    """
    found: dict[str, float] = {}
    for part in ("step", *PARTS):
        seconds = [one[part] for one in times]
        found |= {
            f"cluster/{part}_seconds_median": statistics.median(seconds),
            f"cluster/{part}_seconds_max": max(seconds),
        }
    own = [one["data"] + one["forward"] for one in times]
    return {**found, "cluster/slowest_rank": own.index(max(own))}


def stragglers(
    times: Sequence[Mapping[str, float]],
    hosts: Sequence[str],
    factor: float,
    judged: Sequence[str] = ("data", "forward"),
) -> list[dict[str, Any]]:
    """The ranks, and what of their own work, that keep the others waiting: {rank, host, what, seconds, median}.

    Slow is what takes more than `factor` times the ranks' lower median (with two ranks the faster one's) and 5 % of a step
    more.
    """
    found = []
    step = statistics.median(one["step"] for one in times)
    for what in judged:
        median = statistics.median_low([one[what] for one in times])
        for rank, one in enumerate(times):
            more = one[what] - median
            if one[what] > factor * median and more > max(MATTERS * step, LEAST_SECONDS):
                found.append({"rank": rank, "host": hosts[rank], "what": what, "seconds": one[what], "median": median})
    return found
