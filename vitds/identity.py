"""What makes a run this run and no other, and how two run files differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitds.json_files import finite, read_object

Images = Mapping[str, Mapping[str, Any]]
"""By role, `images`, their number, and `digest`, which other images have not."""

# Keys of the run file, each with everything below it. What is not listed here
# (total steps, micro batch, ZeRO stage, precision, monitors, checkpoint cadence, world size) may change on the way.
IDENTITY = ("train_batch_size", "optimizer", "vitds.model", "vitds.groups", "vitds.train.seed", "vitds.data.order")


FULL_ORDER = {"kind": "full"}
"""What is kept of the default order, and what states say that were saved before there was another."""


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


def other_images(stored: Path, images: Images) -> dict[str, str]:
    """By role, how the images differ from those with which a run began.

    Args:
        stored: images.json of the run, where there is one.
        images: of this start; roles that only one of the two has are passed over.
    """
    before = read_object(stored) if stored.exists() else {}
    return {
        role: f"{before[role].get('images')} images then, {ours['images']} now"
        if before[role].get("images") != ours["images"]
        else f"{ours['images']} images as before, but others, with other labels, or in another order"
        for role, ours in images.items()
        if before.get(role, ours) != ours
    }


def other_training_images(run: Path, other: str, stored: dict[str, Any], resolved: dict[str, Any]) -> str:
    """The message when a run is to go on with other training images, which another minival leaves, too.

    Args:
        run: its directory.
        other: how they differ (`other_images`).
        stored: the run file that it began with.
        resolved: that of this start.
    """
    was, now = (((file.get("vitds") or {}).get("data") or {}).get("minival", 0.0) for file in (stored, resolved))
    key, mend = ("train", "Bring the same files back") if was == now else ("minival", f"Set it to {was:g} again")
    return (
        f"vitds.data.{key}: {run} holds a run on other training images: {other}. {mend}, or take another --output-dir, with "
        "vitds.init_from to go on from the weights that are there."
    )


def identity(run_file: dict[str, Any]) -> dict[str, Any]:
    """The part of a run file that may not change, as {dotted key: value}."""
    found: dict[str, Any] = {}
    for dotted in IDENTITY:
        value: Any = run_file
        for word in dotted.split("."):
            value = value.get(word) if isinstance(value, dict) else None
        found[dotted] = finite(value)
    order = found["vitds.data.order"] or {}
    if isinstance(order, dict) and order.get("kind", "full") == "full":
        # Its other keys say nothing of the full order; runs from before there was a choice have no key at all.
        found["vitds.data.order"] = FULL_ORDER
    return found
