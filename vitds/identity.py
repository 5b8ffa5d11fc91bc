"""What makes a run this run and no other, and how two run files differ."""

from __future__ import annotations

import json
from typing import Any

from vitds.json_files import finite

# Keys of the run file, each with everything below it. What is not listed here
# (total steps, micro batch, ZeRO stage, precision, monitors, checkpoint cadence, world size) may change on the way.
IDENTITY = ("train_batch_size", "optimizer", "vitds.model", "vitds.groups", "vitds.train.seed", "vitds.data.order")


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


def identity(run_file: dict[str, Any]) -> dict[str, Any]:
    """The part of a run file that may not change, as {dotted key: value}."""
    found: dict[str, Any] = {}
    for dotted in IDENTITY:
        value: Any = run_file
        for word in dotted.split("."):
            value = value.get(word) if isinstance(value, dict) else None
        found[dotted] = finite(value)
    return found
