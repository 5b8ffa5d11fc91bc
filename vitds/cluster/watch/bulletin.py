"""Where ranks that can no longer talk to each other write: one directory of a shared file system for each start.

    <output-dir>/incidents/<UTC time>-<token>/
      call.json           empty; {"id"} while a rank asks all others for a report; {"id", "incident"} once it is judged
      rank-00000.json     a rank's state, rewritten while there is a call
      rank-00000.txt      its stacks
      incident.json       created exclusively by the rank that judges

Every file that is looked for exists from the start, empty: a network file system asks its server when it opens a file,
but may believe for a minute that a file which was not there still is not.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

KEPT = 10
"""Directories of incidents that a run keeps."""


class Bulletin:
    """One rank's side of the directory.

    Raises:
        OSError: the directory cannot be used.
    """

    def __init__(self, directory: Path, rank: int, world_size: int) -> None:
        self.directory, self.rank, self.world_size = directory, rank, world_size
        self._call, self._verdict = directory / "call.json", directory / "incident.json"
        self._state = self._state_of(rank)
        self._stacks = self._state.with_suffix(".txt")
        self._state.touch()
        self.stacks = os.open(self._stacks, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        """Descriptor of the stacks' file, to which the interpreter's own last resort writes too."""

    @staticmethod
    def create(home: Path, name: str) -> None:
        """Make the directory `name` below `home`, once for all ranks, and drop what earlier starts left there."""
        home.mkdir(exist_ok=True)
        known = []
        for old in sorted(path for path in home.iterdir() if path.is_dir()):
            with suppress(OSError):
                if (old / "incident.json").exists():
                    known.append(old)
                else:
                    shutil.rmtree(old)
        for old in known[: -KEPT + 1]:
            shutil.rmtree(old, ignore_errors=True)
        (home / name).mkdir()
        (home / name / "call.json").touch()

    def call(self) -> dict[str, Any] | None:
        """The call that is out, or None.

        Raises:
            OSError: it is being written just now.
        """
        text = self._call.read_bytes()
        if not text:
            return None
        try:
            return dict(json.loads(text))
        except ValueError:
            raise OSError(f"{self._call} is half written") from None

    def ring(self) -> dict[str, Any]:
        """Ask all ranks for a report, unless it has been judged: then a call with the incident."""
        call: dict[str, Any] = {"id": uuid.uuid4().hex}
        if self._verdict.exists():  # a rank that took its call back has wiped it from call.json
            return {**call, "incident": _read(self._verdict) or {}}
        _write(self._call, call)
        return call

    def hush(self) -> None:
        """Take the call back."""
        os.truncate(self._call, 0)

    def post(self, report: dict[str, Any]) -> None:
        """Write this rank's report."""
        _write(self._state, report)

    def write_stacks(self, text: str) -> None:
        """Replace this rank's stacks."""
        os.ftruncate(self.stacks, 0)
        os.lseek(self.stacks, 0, os.SEEK_SET)
        os.write(self.stacks, text.encode(errors="replace"))

    def reports(self, call: str) -> dict[int, dict[str, Any]]:
        """What ranks have answered to this call, by rank."""
        found = {}
        for rank in range(self.world_size):
            report = _read(self._state_of(rank))
            if report is not None and report.get("call") == call:
                found[rank] = report
        return found

    def claim(self, incident: dict[str, Any]) -> bool:
        """Become the rank that judges, once and for all; False: another is."""
        try:
            file = open(self._verdict, "x", encoding="utf-8")  # noqa: SIM115
        except FileExistsError:
            return False
        with suppress(OSError), file:  # a full disk keeps nobody from saying it
            json.dump(incident, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        return True

    def publish(self, call: dict[str, Any], incident: dict[str, Any]) -> None:
        """Tell all ranks, when nothing is left for this one to do."""
        _write(self._call, {**call, "incident": incident})

    def close(self) -> None:
        """Without an incident nothing remains of this rank here, and of the last one nothing at all."""
        os.close(self.stacks)
        with suppress(OSError):
            if self._verdict.exists():
                return
            self._state.unlink(missing_ok=True)
            self._stacks.unlink(missing_ok=True)
            if not any(self.directory.glob("rank-*")):
                self._call.unlink(missing_ok=True)
                self.directory.rmdir()
                self.directory.parent.rmdir()

    def _state_of(self, rank: int) -> Path:
        return self.directory / f"rank-{rank:05d}.json"


def _read(path: Path) -> dict[str, Any] | None:
    """None for a file that is empty, missing or half written."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(path: Path, value: dict[str, Any]) -> None:
    """In place: a reader that meets it half written reads again."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False)
