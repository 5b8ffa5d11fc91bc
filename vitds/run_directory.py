"""The directory of one run: its owner, run file, images, events and outcome (docs/design.md §3.5, §3.8).

Only rank 0 writes here; on other ranks every method that writes does nothing.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from vitds import dist
from vitds.errors import EXIT_PREEMPTED, Preempted, Stopped, UserError
from vitds.identity import Images, differences, identity, other_images, other_training_images
from vitds.json_files import Expendable, append_row, finite, read_object, read_rows, say, write_json
from vitds.lease import Lease, Place

OUTCOMES = ("running", "preempted", "finished", "failed")


class RunDirectory:
    """`<output-dir>`. `os.fspath` gives its path.

    Raises:
        UserError: the path is a file, or cannot be created or written in.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self._ours = False
        self._lease = Lease(self.path / "lease.json")
        self._events, self._outcome = Expendable(self.path / "events.jsonl"), Expendable(self.path / "outcome.json")
        self._skips, self._images = self.path / "skips.json", self.path / "images.json"
        self._bad_samples = Expendable(self.path / "bad_samples.jsonl")
        self._place = Place(self.path)
        if not dist.is_main():
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                self._place.settle()
        except (FileExistsError, NotADirectoryError) as error:
            file = next(place for place in (self.path, *self.path.parents) if place.exists())
            raise UserError(f"output directory {self.path}: {file} is a file, not a directory") from error
        except OSError as error:
            raise UserError(f"output directory {self.path} cannot be written: {error.strerror}") from error

    def __fspath__(self) -> str:
        return str(self.path)

    def __enter__(self) -> RunDirectory:
        dist.together(self.acquire)
        self._lease.token = dist.broadcast_object(self._lease.token)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Leave word of why the run broke, if it did, and give the directory back; no trouble hides that reason."""
        with _beside(error):
            if isinstance(error, UserError):
                self.record_failure(2, incident=getattr(error, "incident", None))
            elif error is not None and not isinstance(error, Preempted):
                self.fail(error)
        with _beside(error):
            self.release()

    def acquire(self, wait_seconds: float | None = None) -> None:
        """Become the one owner of this directory; renewed in the background until `release`.

        Args:
            wait_seconds: how long another owner is waited for. None: 15 s for one known to be alive, 75 s for one on
                another host that gives no sign, which is enough to see its lease run out.

        Raises:
            UserError: another process owns it; names its host, pid and the age of its lease.
        """
        if dist.is_main():
            self._lease.acquire(wait_seconds)

    def release(self) -> None:
        """Give the directory back. Does nothing if it is not ours."""
        self._lease.release()

    def check_owner(self) -> None:
        """Called before anything is written over.

        Raises:
            RuntimeError: the lease ran out, for example while this process was suspended, and another run took it.
        """
        self._lease.check()

    def stored_config(self) -> dict[str, Any] | None:
        """The resolved run file of the run that lives here, or None in a fresh directory.

        Raises:
            UserError: config.json cannot be read, or there are checkpoints but no config.json to say whose they are.
        """
        path = self.path / "config.json"
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if any(self.checkpoints.glob("step-*")):
                raise UserError(
                    f"{self.path} holds checkpoints but no config.json to say of which run; choose another --output-dir"
                ) from None
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if not isinstance(stored, dict):
            raise UserError(f"{path} is not a run file: expected an object")
        return stored

    def refuse_other_run(self, resolved: dict[str, Any], images: Images) -> None:
        """What lives here, if anything does, must be the run of this resolved run file, on these training images.

        Raises:
            UserError: model, optimizer, groups, global batch, seed or order differ: shows each differing key, old → new;
                the training images differ.
        """
        stored = self.stored_config()
        if stored is None:
            return
        differing = differences(identity(stored), identity(resolved))
        if differing:
            raise UserError(
                f"{self.path} holds another run, which differs in (there → here):\n  "
                + "\n  ".join(differing)
                + "\nTake another --output-dir, or the run file of the run that is there."
            )
        if other := other_images(self._images, images).get("train"):
            raise UserError(other_training_images(self.path, other, stored, resolved))

    def write_config(self, resolved: dict[str, Any], images: Images) -> None:
        """Keep the resolved run file as config.json, and what tells its images from others as images.json; what has changed
        since the last start goes into events.jsonl.

        Raises:
            UserError: another run lives here (`refuse_other_run`).
        """
        self.refuse_other_run(resolved, images)
        stored, others = self.stored_config(), other_images(self._images, images)
        self._ours = True
        if not dist.is_main():
            return
        changes = differences(stored, finite(resolved)) if stored is not None else []
        self.check_owner()
        write_json(self.path / "config.json", resolved)
        write_json(self._images, images)
        if changes:
            self.event("config", changes=changes)
        for role, other in others.items():
            say(f"vitds: vitds.data.{role}: other images than at the last start: {other}")
            self.event("images", role=role, difference=other)

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line to events.jsonl: time (Unix, s), kind, fields. Lost where the disk has no room for it."""
        if not dist.is_main():
            return
        self.check_owner()
        with self._events:
            self._place.check()
            append_row(self.path / "events.jsonl", {"time": time.time(), "kind": kind, **fields})

    def bad_samples(self) -> list[dict[str, Any]]:
        """What `add_bad_samples` was given, by every start of this run. Collective."""
        rows = dist.together(lambda: read_rows(self.path / "bad_samples.jsonl") if dist.is_main() else [])
        return dist.broadcast_object(rows)  # type: ignore[no-any-return]

    def add_bad_samples(self, found: Sequence[dict[str, Any]]) -> None:
        """Append to bad_samples.jsonl, from whatever rank. Lost where the disk has no room for it."""
        self.check_owner()
        with self._bad_samples:
            self._place.check()
            for bad in found:
                append_row(self.path / "bad_samples.jsonl", {"time": time.time(), **bad})

    @property
    def skips(self) -> list[tuple[int, int]]:
        """The ranges [start, end) of positions that this run has given up, one a rollback, in the order in which it
        did; the same on every rank. Collective.

        Raises:
            UserError: skips.json is not what `add_skip` writes, or a range in it is no whole number of the batches
                that config.json, if it is there, speaks of.
        """
        found = dist.together(lambda: self._read_skips() if dist.is_main() else [])
        return [(entry["start"], entry["end"]) for entry in dist.broadcast_object(found)]

    def _read_skips(self) -> list[dict[str, Any]]:
        config = self.path / "config.json"
        batch = read_object(config).get("train_batch_size") if self._skips.exists() and config.exists() else None
        return read_skips(self._skips, batch if isinstance(batch, int) and batch > 0 else 1)

    def add_skip(self, start: int, end: int, **why: Any) -> None:
        """Give up the positions [start, end), durably: no later start of the run sees them again. Collective.

        Raises:
            UserError: skips.json is not what this wrote.
            Stopped: it cannot be written.
        """
        assert 0 <= start < end, (start, end)

        def write() -> None:
            if not dist.is_main():
                return
            self.check_owner()
            entry = {"start": start, "end": end, "time": time.time(), **why}
            try:
                self._place.check()
                write_json(self._skips, {"skips": [*self._read_skips(), entry]})
            except OSError as error:
                raise Stopped(f"{self._skips} cannot be written, so there is no rollback: {error}") from error

        dist.together(write)
        self.event("rollback", positions=[start, end], **why)

    def outcome(self, state: str, exit_code: int | None, step: int) -> None:
        """Write outcome.json, from which batch scripts decide.

        Args:
            state: running, preempted, finished or failed.
            exit_code: what this process ends with; None while running.
            step: updates made.
        """
        assert state in OUTCOMES, state
        if dist.is_main():
            self.check_owner()
            self._write_outcome({"state": state, "exit_code": exit_code, "step": step, "time": time.time()})

    def started(self, step: int, origin: str) -> None:
        """Training begins at `step`; `origin` says from what."""
        self.event("start", step=step, origin=origin, world_size=dist.world_size())
        self.outcome("running", None, step)

    def finished(self, step: int, evaluation: dict[str, float]) -> None:
        """Nothing is left to do."""
        self.event("finish", step=step, **evaluation)
        self.outcome("finished", 0, step)

    def preempted(self, step: int, reason: str) -> None:
        """All is saved, and the same command goes on."""
        self.event("preempt", step=step, reason=reason)
        self.outcome("preempted", EXIT_PREEMPTED, step)

    def fail(self, error: BaseException) -> None:
        """Add to an error where the run can go on from, and leave outcome.json saying that it failed."""
        step = 0
        try:
            self._place.check()
            step = self._newest_step()
            newest = self.checkpoints / f"step-{step:09d}"
            where = f"the last checkpoint is {newest}" if step else "there is no checkpoint yet"
        except OSError as trouble:
            where = f"{self.checkpoints} cannot be read ({trouble})"
        error.add_note(f"vitds: {where}; the same command goes on from there")
        with _beside(error):
            incident = getattr(error, "incident", None) or {}
            self.record_failure(incident.get("exit_code", 1), step, incident or None)
            if self._lease.is_ours():  # otherwise what is here is another run's
                self.event("fail", reason=f"{type(error).__name__}: {error}", last_checkpoint=step)

    def record_failure(self, exit_code: int, step: int = 0, incident: dict[str, Any] | None = None) -> None:
        """Leave outcome.json saying that the run failed; any rank may, for rank 0 may be ended before it knows.

        Does nothing before `write_config`, nor when the lease does not name this job: what is here may be another run's.
        """
        if (self._ours or incident) and self._lease.is_ours():
            more = {"incident": incident} if incident else {}
            self._write_outcome({"state": "failed", "exit_code": exit_code, "step": step, "time": time.time(), **more})

    def incident(self, found: dict[str, Any]) -> None:
        """What has happened to the job (vitds.cluster.watch.watching), into outcome.json and events.jsonl; by the one rank that
        judges it, which need not be rank 0, in whatever thread."""
        self.record_failure(found.get("exit_code", 1), self._newest_step(), found)
        if self._lease.is_ours():
            append_row(self.path / "events.jsonl", {"time": time.time(), "kind": "incident", **found})

    def _newest_step(self) -> int:
        """Of the newest checkpoint by its name; 0 if there is none."""
        return max((int(p.name[5:]) for p in self.checkpoints.glob("step-*") if p.name[5:].isdigit()), default=0)

    def _write_outcome(self, outcome: dict[str, Any]) -> None:
        with self._outcome:
            self._place.check()
            write_json(self.path / "outcome.json", outcome)


@contextmanager
def _beside(error: BaseException | None) -> Iterator[None]:
    """While `error` is under way, what goes wrong in the block is said and does not take its place."""
    try:
        yield
    except Exception as trouble:
        if error is None:
            raise
        say(f"vitds: while a run ended with {type(error).__name__}: {type(trouble).__name__}: {trouble}")


def read_skips(path: Path, batch: int = 1) -> list[dict[str, Any]]:
    """The entries of skips.json, none if there is no such file; refuses what `add_skip` would not have written.

    Args:
        path: the file.
        batch: the global batch; ranges are whole numbers of it.
    """
    if not path.exists():
        return []
    entries = read_object(path).get("skips")
    if not isinstance(entries, list):
        raise UserError(f"{path}: expected a list under skips")
    for i, entry in enumerate(entries):
        edges: list[Any] = [entry.get(name) for name in ("start", "end")] if isinstance(entry, dict) else [None]
        if any(type(edge) is not int for edge in edges) or not 0 <= edges[0] < edges[1]:
            raise UserError(f"{path}: skips[{i}]: expected whole numbers 0 ≤ start < end, found {entry!r}")
        if edges[0] % batch or edges[1] % batch:
            raise UserError(
                f"{path}: skips[{i}]: expected whole batches of {batch} (train_batch_size), found {entry!r}"
            )
    return entries
