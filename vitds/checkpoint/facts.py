"""What a checkpoint's model card says of the run: data, recipe and what was measured. No path but its last word."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from vitds.checkpoint.progress import Progress
from vitds.data.transforms import TRAIN_DEFAULT
from vitds.models import Result, Training

SAID = {"train": "Trained on", "eval": "Evaluated on"}
PARTS = ("train", "training", "val", "valid", "validation", "eval", "test")
"""Last words of a path that do not name what is there."""
_FEWSHOT = re.compile(r"(?P<set>.+)_(?P<shots>\d+)shot")
_TOP = re.compile(r"top(\d+)")


def facts(
    resolved: Mapping[str, Any],
    progress: Progress,
    total_steps: int,
    images: Mapping[str, Mapping[str, Any]],
    versions: Mapping[str, str],
    evaluation_transforms: Any = None,
) -> Training:
    """What can be said of a run at `progress`.

    Args:
        resolved: the run file with every key explicit.
        total_steps: of the run.
        images: by role, their number; a role that is not there is not counted.
        versions: of the programs that write the checkpoint.
        evaluation_transforms: of the run's evaluation, where the saved image processor does something else.
    """
    part = resolved.get("vitds", {})
    data = part.get("data", {})
    roles = {role: data[role] for role in ("train", "eval") if data.get(role)}
    lines = [f"{said} {data_name(roles[role])}{_counted(images, role)}" for role, said in SAID.items() if role in roles]
    if images.get("minival"):
        lines.append(f"Held out of training (minival){_counted(images, 'minival')}")
    prepared = roles.get("train", {}).get("transforms")
    recipe = {
        "steps": f"{progress.step:,} of {total_steps:,}, {resolved['train_batch_size']:,} images each",
        "images seen": f"{progress.images_seen:,}" + _epochs(images, progress.images_seen),
        "optimizer": _named(resolved["optimizer"]),
        "schedule": _named(resolved.get("scheduler", {})),
        "gradient clipping": str(resolved.get("gradient_clipping", "")),
        "precision": precision(resolved),
        "training transforms": json.dumps(TRAIN_DEFAULT if prepared is None else prepared),
        "mixup": str(data.get("mixup") or ""),
        "started from": _start(part.get("init_from")),
        "seed": str(part.get("train", {}).get("seed", "")),
    }
    recipe = {word: value for word, value in recipe.items() if value}
    notes = []
    if evaluation_transforms is not None:
        notes.append(
            f"Evaluation in training prepared its images by {json.dumps(evaluation_transforms)}. The image processor saved here "
            "cannot, and resizes the shorter edge before it cuts out the middle: expect other figures."
        )
    at = "" if progress.evaluated == progress.step else f"of the weights at step {progress.evaluated:,}"
    return Training(lines, recipe, results(progress.evaluation, roles), at, versions, notes)


def results(evaluation: Mapping[str, Any], roles: Mapping[str, Mapping[str, Any]]) -> list[Result]:
    """The figures of an evaluation that are finite: shares of right answers, and losses; of a few-shot set its means.

    Args:
        evaluation: by name, as in metrics: eval/top1, eval_ema/loss, fewshot/digits_10shot, …
        roles: the sections of the images, for their names.
    """
    found = []
    for key, value in evaluation.items():
        role, _, metric = key.partition("/")
        averaged = ", averaged weights" if role.endswith("_ema") else ""
        role = role.removesuffix("_ema")
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            continue
        if role == "fewshot":
            if probe := _FEWSHOT.fullmatch(metric):
                images = "image" if probe["shots"] == "1" else "images"
                found.append(
                    Result(probe["set"], f"linear probe, {probe['shots']} {images} of a class{averaged}", value)
                )
            continue
        name = data_name(roles["eval" if role == "eval" else "train"]) if role in (*roles, "minival") else role
        name += " (held out of training)" if role == "minival" else ""
        if top := _TOP.fullmatch(metric):
            found.append(Result(name, f"top-{top[1]}{averaged}", value))
        elif metric == "loss":
            found.append(Result(name, f"loss{averaged}", value, share=False))
    return found


def data_name(section: Mapping[str, Any]) -> str:
    """What a section's images are called: the last word of their path (two, where it says no more than what they are for),
    else their source."""
    path = PurePath(section.get("path") or section["source"])
    name = f"{path.parent.name}/{path.name}" if path.name in PARTS and path.parent.name else path.name
    return f"{name}, {section['split']}" if section.get("split") else name


def _counted(images: Mapping[str, Mapping[str, Any]], role: str) -> str:
    number = images.get(role, {}).get("images")
    return f", {number:,} images" if number else ""


def _epochs(images: Mapping[str, Mapping[str, Any]], seen: int) -> str:
    number = images.get("train", {}).get("images")
    return f" ({seen / number:.3g} epochs)" if number else ""


def _start(section: Mapping[str, Any] | None) -> str:
    return f"{section['what']} of {PurePath(section['path']).name}" if section else ""


def precision(resolved: Mapping[str, Any]) -> str:
    """In which numbers the model was trained."""
    for name in ("bf16", "fp16"):
        section = resolved.get(name) or {}
        if section.get("enabled"):
            masters = "bf16" if section.get("bf16_master_weights_and_grads") else "fp32"
            return f"{name}, {masters} master weights"
    return "fp32"


def _named(section: Mapping[str, Any]) -> str:
    """`type (parameter value, …)` of a section with a type and its params."""
    given = (section.get("params") or {}).items()
    params = ", ".join(f"{name} {json.dumps(value)}" for name, value in given if value is not None)
    return f"{section.get('type', '')} ({params})" if params else str(section.get("type", ""))
