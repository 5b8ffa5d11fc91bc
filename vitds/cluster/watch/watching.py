"""Sees that a rank no longer gets on, agrees with the others on which rank is to blame, and ends the job.

Every rank has a thread that looks at the main thread's last beat. When its bound has passed (`Rhythm`), or the main thread
has raised, or a rank of the same host has died, it asks all ranks for a report through a shared directory (`Bulletin`):
ranks that wait in a collective for a dead host cannot be asked otherwise. The lowest rank that can judges, says it in one
message, and all end with exit code 1. A rank whose bound has not passed is waited for: it may be in a long save.
"""

from __future__ import annotations

import faulthandler
import math
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from vitds import dist
from vitds.cluster.section import ClusterSection
from vitds.cluster.watch.bulletin import Bulletin
from vitds.cluster.watch.incidents import can_be_judged, is_agreed, is_of_a_connection, judge, one_line
from vitds.cluster.watch.neighbours import Neighbours, own_card
from vitds.cluster.watch.rhythm import Pulse, Rhythm
from vitds.cluster.watch.stacks import Standing, all_stacks, flight_record, frames_of_error, standing, whereabouts
from vitds.errors import UserError
from vitds.json_files import say

GRACE_SECONDS = 10.0
"""How long after a call a rank may take to report."""
MARGIN_SECONDS = 60.0
"""How long after its bound a rank is ended that can run no Python, or whose disk does not answer."""
UNWIND_SECONDS = 60.0
"""How long after the verdict the main thread may take to end by its own error."""


class Watch:
    """Of one rank; entered in its main thread, before there is a process group.

    Args:
        section: the run file's `vitds.cluster`.
        output_dir: the run's directory, shared by all hosts.
        grace, margin: see GRACE_SECONDS and MARGIN_SECONDS.
    """

    def __init__(
        self, section: ClusterSection, output_dir: Path, grace: float = GRACE_SECONDS, margin: float = MARGIN_SECONDS
    ) -> None:
        self._home, self._grace, self._margin = Path(output_dir) / "incidents", grace, margin
        self._rhythm = Rhythm(section)
        self._main = threading.get_ident()
        self._host = socket.gethostname()
        self._hosts, self._neighbours = [self._host], Neighbours({0: {}}, 0)
        self._fail: Callable[[dict[str, Any]], None] = lambda incident: None
        self._bulletin: Bulletin | None = None
        self._error: BaseException | None = None
        self._incident: dict[str, Any] | None = None
        self._lock = threading.Lock()
        """Held by the watching thread while it uses the bulletin."""
        self._wake, self._judged = threading.Event(), threading.Event()
        self._over, self._asking = threading.Event(), False
        self._arming = threading.Lock()
        self._looked = time.monotonic()
        """When the watching thread last came back from the shared directory."""
        self._call: str | None = None
        self._called = time.monotonic()
        self._claimed: float | None = None
        """Since when another rank is known to judge."""
        self._posts = 0
        self._seen: dict[int, tuple[dict[str, Any], float]] = {}
        """By rank: its last report to this call, and when that was first seen."""
        self._every = 1.0
        self._threads = [
            threading.Thread(target=target, name="watch", daemon=True) for target in (self._run, self._keep_armed)
        ]

    def __enter__(self) -> Watch:
        self._main = threading.get_ident()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(self._grace)
        faulthandler.cancel_dump_traceback_later()

    def beat(self, step: int) -> None:
        """Called by the main thread where it gets on; `step` updates have been made. Takes about two microseconds."""
        self._rhythm.beat(step)

    @contextmanager
    def during(self, phase: str, learns: bool = True) -> Iterator[None]:
        """Around what takes another time than a step: its bound is its own, and beats inside count for it.

        Args:
            phase: its name, for the message.
            learns: False where one time says nothing of the next, as for a save that may wait for the one before: its
                bound is `first_seconds` every time.
        """
        self._rhythm.enter(phase, learns)
        try:
            yield
        finally:
            self._rhythm.leave()

    @contextmanager
    def introduce(self, fail: Callable[[dict[str, Any]], None]) -> Iterator[None]:
        """From here on ranks know each other's hosts and report to each other. Collective; in the owned output directory.

        An error that leaves the block, and is not one that all ranks agreed on, has `error.incident`: what the ranks that
        could still be asked say of it. It is the same on all of them.

        Args:
            fail: called with the incident by the one rank that judges, in whatever thread, before any rank ends.
        """
        self._fail = fail
        rank, world_size = dist.rank(), dist.world_size()
        name = dist.broadcast_object(f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}")
        cards = dist.all_objects((self._host, own_card()))
        dist.together(lambda: Bulletin.create(self._home, name) if rank == 0 else None)
        place = self._home / name
        seen = (place / "call.json").exists()
        bulletin = dist.together(lambda: Bulletin(place, rank, world_size) if seen else None)
        blind = next(filter(None, dist.all_objects(None if seen else self._host)), None)
        if blind is None:
            self._hosts = [host for host, _ in cards]
            self._neighbours = Neighbours({i: card for i, (_, card) in enumerate(cards)}, rank)
            self._every = min(max(1.0, world_size / 256), max(0.05, self._grace / 4))
            self._bulletin = bulletin
            self._keep_armed(once=True)  # from here on with a file for the stacks
            self._wake.set()
        elif rank == 0:
            say(
                f"vitds: {place} is not seen on {blind}: without a shared output directory nobody can say whose a hang is"
            )
        try:
            yield
        except BaseException as error:
            if is_agreed(error):
                raise
            incident = self._inquest(error)
            if incident is not None:
                error.incident = incident  # type: ignore[attr-defined]
            raise
        finally:
            # The watching thread may be held up by a disk that does not answer; it must then keep its files.
            if self._lock.acquire(timeout=self._grace):
                with self._arming:
                    self._bulletin = None
                    faulthandler.cancel_dump_traceback_later()  # it would write to a file that is closed
                if bulletin is not None:
                    bulletin.close()
                self._lock.release()

    def _inquest(self, error: BaseException) -> dict[str, Any] | None:
        """Wait, for a bounded time, for what becomes of an error of the main thread's."""
        if self._bulletin is None:
            return None
        self._error = error
        self._wake.set()
        self._judged.wait(4 * self._grace + 20)
        return self._incident

    def _run(self) -> None:
        troubled: float | None = None
        while not self._over.is_set():
            pulse = self._rhythm.pulse
            left = pulse.bound - self._rhythm.silence(pulse)
            try:
                with self._lock:
                    verdict = self._look(pulse, left)
                troubled = None
            except OSError as trouble:
                # A file half written by another rank is whole at the next look.
                verdict, troubled = None, troubled or time.monotonic()
                if left <= 0 and not self._error and time.monotonic() - troubled > self._grace:
                    self._end_alone(pulse, f"{self._home} cannot be used ({trouble})")
            self._looked = time.monotonic()
            if verdict is not None:
                self._obey(verdict)
            began = time.monotonic()
            self._wake.wait(self._every)
            self._wake.clear()
            waited = time.monotonic() - began
            if waited > 5 * self._every + 1:  # suspended: nobody ran, and nothing hung
                self._rhythm.absent += waited

    def _keep_armed(self, once: bool = False) -> None:
        """Renew the last resort, for as long as the main thread gets on or is looked after.

        In a thread that touches no disk: a file server that is away must not end ranks that train without it.
        """
        while True:
            left = self._rhythm.pulse.bound - self._rhythm.silence(self._rhythm.pulse)
            if left > 0 or time.monotonic() - self._looked <= self._margin:
                with self._arming:
                    self._arm(left)
            if once or self._over.wait(min(1.0, self._every)):
                return

    def _arm(self, left: float) -> None:
        """C code that ends this process when no Python can."""
        if self._error is not None:
            left = 4 * self._grace + UNWIND_SECONDS
        if math.isinf(left):
            faulthandler.cancel_dump_traceback_later()
            return
        file = self._bulletin.stacks if self._bulletin is not None else 2
        faulthandler.dump_traceback_later(max(left, 0) + self._margin, exit=True, file=file)

    def _look(self, pulse: Pulse, left: float) -> dict[str, Any] | None:
        """Do what is due now; what the job ends by, once that is known."""
        bulletin = self._bulletin
        if bulletin is None:
            if left <= 0:
                self._end_alone(pulse, "no other rank can be asked")
            return None
        gone = self._neighbours.gone()
        before, self._asking = self._asking, left <= 0 or self._error is not None or bool(gone)
        call = bulletin.call()
        if self._asking and call is None:
            call = bulletin.ring()
        if call is not None and "incident" in call:
            return dict(call["incident"])
        if before and not self._asking and call is not None:
            bulletin.hush()  # it was no hang
            call = None
        if call is None:
            self._call = None
            return None
        if call["id"] != self._call:
            self._call, self._called = call["id"], time.monotonic()
            self._seen.clear()
            self._write_stacks(bulletin, pulse)
        bulletin.post(self._report(pulse, left, gone))
        return self._judge(bulletin, call, gone)

    def _report(self, pulse: Pulse, left: float, gone: list[int]) -> dict[str, Any]:
        self._posts += 1
        error = self._error
        at = standing(frames_of_error(error.__traceback__)) if error else whereabouts(self._main)
        return {
            "call": self._call, "number": self._posts, "rank": dist.rank(), "host": self._host, "pid": os.getpid(),
            "step": pulse.step, "beats": pulse.beats, "phase": pulse.phase, "time": time.time(),
            "seconds": round(self._rhythm.silence(pulse), 1), "left": None if math.isinf(left) else round(left, 1),
            "place": at.place, "collective": at.collective, "error": one_line(error) if error else None,
            "connection": error is not None and is_of_a_connection(error), "gone": gone,
            "refused": isinstance(error, UserError),
        }  # fmt: skip

    def _judge(self, bulletin: Bulletin, call: dict[str, Any], gone: list[int]) -> dict[str, Any] | None:
        """Judge, if it is this rank's turn and the reports suffice."""
        waited, rank = time.monotonic() - self._called, dist.rank()
        turn = 0.0 if all(lower in gone for lower in range(rank)) else self._grace + 5 + min(rank, 20) / 2
        if self._claimed is not None and time.monotonic() - self._claimed > self._grace + 20:
            return {}  # the rank that judged could not say so
        if waited < turn:
            return None
        reports = self._current(bulletin.reports(call["id"]))
        if not can_be_judged(reports, bulletin.world_size, waited >= self._grace):
            return None
        incident = judge(reports, self._hosts, str(bulletin.directory))
        if not bulletin.claim(incident):
            self._claimed = self._claimed or time.monotonic()
            return None
        say(f"vitds: {incident['message']}")
        try:
            self._fail(incident)
        except Exception as trouble:
            say(f"vitds: the incident could not be written down: {type(trouble).__name__}: {trouble}")
        with suppress(OSError):
            bulletin.publish(call, incident)
        return incident

    def _current(self, reports: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """The reports of ranks that keep reporting.

        One that has stopped counts for a while: its rank may have gone on and ended in order, as this one is about to.
        """
        now = time.monotonic()
        for rank, report in reports.items():
            if rank not in self._seen or self._seen[rank][0]["number"] != report["number"]:
                self._seen[rank] = report, now
        patience = max(self._grace, 4 * self._every)
        return {rank: report for rank, (report, since) in self._seen.items() if now - since <= patience}

    def _obey(self, incident: dict[str, Any]) -> None:
        """End; where the main thread is on its way out by its own error, it is let go, for a bounded time."""
        self._incident = incident or None
        self._judged.set()
        if self._error is not None:
            self._wake.clear()
            if not self._over.is_set():
                self._wake.wait(UNWIND_SECONDS)
            if self._over.is_set():
                return
        _end()

    def _end_alone(self, pulse: Pulse, why: str) -> None:
        """A hang of which the others cannot be told."""
        at: Standing = whereabouts(self._main)
        where = f"waits in {at.collective}" if at.collective else f"stands at {at.place}"
        rank = f"rank {dist.rank()} on {self._host}"
        say(
            f"{all_stacks(f'vitds: stacks of {rank}:', self._main)}vitds: {rank} made no progress for "
            f"{self._rhythm.silence(pulse):.0f} s at step {pulse.step} ({pulse.phase}) and {where}; {why}"
        )
        _end()

    def _write_stacks(self, bulletin: Bulletin, pulse: Pulse) -> None:
        title = f"rank {dist.rank()} on {self._host}, process {os.getpid()}, step {pulse.step}, {pulse.phase}"
        text = all_stacks(title, self._main, self._error)
        record = flight_record()
        bulletin.write_stacks(text if record is None else f"{text}\ntorch's flight recorder:\n{record}\n")


def _end() -> None:
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(1)
