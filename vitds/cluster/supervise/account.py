"""What a run's directory says of one attempt: read by `vitds run`, which is not the directory's owner."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitds.interruption import LAUNCHER_IS_GONE

_LONGEST = 300


class Account:
    """What stands in a run's directory now, to be compared with what stands there after an attempt."""

    def __init__(self, output_dir: Path) -> None:
        self._output_dir = output_dir
        self._events = output_dir / "events.jsonl"
        try:
            self._known = self._events.stat().st_size
        except OSError:
            self._known = 0

    def newest_checkpoint(self) -> int:
        """The step of the newest checkpoint; 0 if there is none, or none can be read."""
        try:
            names = [path.name[5:] for path in (self._output_dir / "checkpoints").glob("step-*")]
        except OSError:
            return 0
        return max((int(name) for name in names if name.isdigit()), default=0)

    def preempted_by(self) -> str:
        """Why the ranks of this attempt saved and stopped."""
        return str(next((row.get("reason") for row in self._rows("preempt")), LAUNCHER_IS_GONE))

    def reason(self, code: int, outcome: dict[str, Any]) -> str:
        """In one line, how this attempt ended; without an outcome the command's code is all there is."""
        incident = outcome.get("incident")
        if isinstance(incident, dict):
            said = f"{incident.get('what', 'incident')}: {incident.get('message', '')}"
        elif outcome.get("state") == "preempted":
            said = f"preempted ({self.preempted_by()})"
        elif row := next(self._rows("fail"), None):
            said = str(row.get("reason"))
        else:
            said = f"the command ended with code {code}" + ("" if outcome else " before training began")
        return said.strip().split("\n")[0][:_LONGEST]

    def run_file(self) -> dict[str, Any]:
        """The resolved run file, {} if there is none yet."""
        return _object(self._output_dir / "config.json")

    def _rows(self, kind: str) -> Iterator[dict[str, Any]]:
        """The events of one kind since this account was opened, the last one first."""
        try:
            with open(self._events, "rb") as file:
                file.seek(self._known)
                lines = file.read().splitlines()
        except OSError:
            return
        for line in reversed(lines):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and row.get("kind") == kind:
                yield row


def fixes_micro_batch(config: str | None, overrides: list[str]) -> bool:
    """Whether the user's run file or a `--set` names the batch per rank; the resolved one always does."""
    key = "train_micro_batch_size_per_gpu"
    return any(one.partition("=")[0] == key for one in overrides) or bool(config and key in _object(Path(config)))


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
