"""The directory of one run: its owner, its run file, its events and its outcome (docs/design.md §3.5, §3.8).

Only rank 0 writes here; on other ranks every method that writes does nothing.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from vitds import dist
from vitds.errors import UserError
from vitds.json_files import append_row, finite, write_json
from vitds.lease import Lease

OUTCOMES = ("running", "preempted", "finished", "failed")

# What makes a run this run and no other: keys of the run file, each with everything below it. What is not listed here
# (total steps, micro batch, ZeRO stage, precision, monitors, checkpoint cadence, world size) may change on the way.
IDENTITY = ("train_batch_size", "optimizer", "vitds.model", "vitds.groups", "vitds.train.seed")


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
        if not dist.is_main():
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except (FileExistsError, NotADirectoryError) as error:
            file = next(place for place in (self.path, *self.path.parents) if place.exists())
            raise UserError(f"output directory {self.path}: {file} is a file, not a directory") from error
        except OSError as error:
            raise UserError(f"output directory {self.path} cannot be written: {error.strerror}") from error

    def __fspath__(self) -> str:
        return str(self.path)

    def __enter__(self) -> RunDirectory:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
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

    def refuse_other_run(self, resolved: dict[str, Any]) -> None:
        """What lives here, if anything does, must be the run of this resolved run file.

        Raises:
            UserError: model, optimizer, groups, global batch or seed differ; shows each differing key, old → new.
        """
        stored = self.stored_config()
        if stored is None:
            return
        differing = differences(_identity(stored), _identity(resolved))
        if differing:
            raise UserError(
                f"{self.path} holds another run, which differs in (there → here):\n  "
                + "\n  ".join(differing)
                + "\nTake another --output-dir, or the run file of the run that is there."
            )

    def write_config(self, resolved: dict[str, Any]) -> None:
        """Keep the resolved run file as config.json; what has changed since the last start goes into events.jsonl.

        Raises:
            UserError: another run lives here (`refuse_other_run`).
        """
        self.refuse_other_run(resolved)
        stored = self.stored_config()
        self._ours = True
        if not dist.is_main():
            return
        changes = differences(stored, finite(resolved)) if stored is not None else []
        self.check_owner()
        write_json(self.path / "config.json", resolved)
        if changes:
            self.event("config", changes=changes)

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line to events.jsonl: time (Unix, s), kind, fields."""
        if not dist.is_main():
            return
        self.check_owner()
        append_row(self.path / "events.jsonl", {"time": time.time(), "kind": kind, **fields})

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
            write_json(
                self.path / "outcome.json", {"state": state, "exit_code": exit_code, "step": step, "time": time.time()}
            )

    def bad_samples(self, found: list[dict[str, Any]]) -> None:
        """Name images that could not be decoded, in events.jsonl and on the console."""
        for bad in found:
            self.event("bad sample", **bad)
            if dist.is_main():
                print(f"vitds: bad sample {bad['key']}: {bad['reason']}", file=sys.stderr, flush=True)

    def fail(self, reason: str) -> None:
        """Say why a run broke and where it can go on from, and leave outcome.json saying that it failed."""
        newest = max((p.name for p in self.checkpoints.glob("step-*") if p.name[5:].isdigit()), default=None)
        step = int(newest[5:]) if newest else 0
        where = f"the last checkpoint is {self.checkpoints / newest}" if newest else "there is no checkpoint yet"
        if dist.is_main():
            print(f"vitds: {reason}; {where}; the same command goes on from there", file=sys.stderr, flush=True)
        self.record_failure(1, step)
        if self._lease.held:  # otherwise what is here is another run's
            self.event("fail", reason=reason, last_checkpoint=step)

    def record_failure(self, exit_code: int, step: int = 0) -> None:
        """Leave outcome.json saying that the run failed; any rank may, for rank 0 may be ended before it knows.

        Does nothing before `write_config`: until then what is here may be another run's.
        """
        if self._ours and (self._lease.held or not dist.is_main()):
            row = {"state": "failed", "exit_code": exit_code, "step": step, "time": time.time()}
            write_json(self.path / "outcome.json", row)


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """One line "key: old → new" per leaf in which two JSON values differ; missing, null and empty are the same."""
    if isinstance(old or {}, dict) and isinstance(new or {}, dict) and (old or new):
        old, new = old or {}, new or {}
        lines = []
        for key in [*old, *(key for key in new if key not in old)]:
            lines += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return lines
    nothing: tuple[Any, ...] = (None, {}, [], "")
    if old == new or (old in nothing and new in nothing):
        return []
    return [f"{path}: {_shown(old)} → {_shown(new)}"]


def _shown(value: Any) -> str:
    return "(not set)" if value is None else json.dumps(value, ensure_ascii=False)


def _identity(run_file: dict[str, Any]) -> dict[str, Any]:
    """The part of a run file that may not change, as {dotted key: value}."""
    found: dict[str, Any] = {}
    for dotted in IDENTITY:
        value: Any = run_file
        for word in dotted.split("."):
            value = value.get(word) if isinstance(value, dict) else None
        found[dotted] = finite(value)
    return found
