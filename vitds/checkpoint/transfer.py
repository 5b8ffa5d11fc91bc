"""Weights of another model as the beginning of this one: which are taken, which are made anew, and which cannot be."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitds.checkpoint.exchange.weights import WeightsFile
from vitds.checkpoint.format import EMA, MODEL, step_of
from vitds.checkpoint.whole import check_whole
from vitds.errors import UserError, nearest
from vitds.models import ViTConfig, ViTForImageClassification, label_names, resample_position_embedding
from vitds.sections import key

KERNEL, BIAS = "head.weight", "head.bias"
"""Of the classifier."""
POSITIONS = "pos_embed"


@dataclass(frozen=True)
class InitFromSection:
    """Where a fresh run takes its weights from; its own checkpoint always comes first."""

    path: str = key(
        doc="A run's directory (its newest checkpoint), a checkpoint directory (step-…), a Hugging Face directory, or a file of "
        "weights (docs/formats.md)."
    )
    what: str = key(
        "weights",
        "weights alone; ema, the average kept beside them, as weights; or all: optimizer state, step and position too (a fork).",
        choices=("weights", "ema", "all"),
    )
    head: str = key(
        "auto",
        "The classifier: reset, it starts at zero; keep, it is taken, and must have as many classes; auto, it is taken where "
        "the names of its classes are known to be those here, and starts at zero where they are others; what cannot be known is asked.",
        choices=("auto", "keep", "reset"),
    )


@dataclass(frozen=True)
class Transfer:
    """What becomes of each parameter of this run's model; a partition of their names."""

    kept: frozenset[str]
    resampled: frozenset[str]
    fresh: frozenset[str]
    notes: tuple[str, ...]
    """What is not simply taken, in words."""
    bias_shift: float = 0.0
    """To be added to a classifier's bias that is kept: the difference of what the two models add to their logits."""


def source_of(path: Path) -> Path:
    """The file or directory of weights that a path names: of a run's directory the newest checkpoint that is whole, but for
    its tensors' sums.

    Raises:
        UserError: there is nothing, or there are checkpoints and none is whole.
    """
    if not path.exists():
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"vitds.init_from.path: {str(path)!r} does not exist{nearest(path.name, siblings)}")
    if not path.is_dir():
        return path
    for directory in (path / "checkpoints", path):
        steps = {step_of(found.name): found for found in directory.iterdir()} if directory.is_dir() else {}
        reasons = []
        for step in sorted((step for step in steps if step is not None), reverse=True):
            try:
                check_whole(steps[step])
                return steps[step]
            except (UserError, OSError) as error:
                reasons.append(str(error))
        if reasons:
            raise UserError(f"vitds.init_from.path: no checkpoint of {path} can be used: {'; '.join(reasons[:3])}")
    if (path / "config.json").exists() and (path / "events.jsonl").exists():
        raise UserError(f"vitds.init_from.path: {path} is a run's directory without any checkpoint yet")
    return path


def look_at(
    section: InitFromSection, model: ViTForImageClassification, frozen: Collection[str] = ()
) -> tuple[str, ...]:
    """What will be changed of the weights that a run starts from, by what their headers say; alone, before any process group.

    Args:
        section: of the run file.
        model: of the run; only its configuration and shapes are asked for.
        frozen: names of parameters that are not trained.

    Raises:
        UserError: see `source_of`, `plan_transfer` and WeightsFile.
    """
    path = source_of(Path(section.path))
    weights = WeightsFile(path, EMA if section.what == "ema" else MODEL)
    found = transfer_of(weights, model, "keep" if section.what == "all" else section.head, frozen)
    if section.what == "all" and found.resampled:
        raise UserError(f"vitds.init_from.what: all goes on with the same model; {found.notes[-1]}")
    return (f"{section.what} from {path}", *(() if section.what == "all" else found.notes))


def transfer_of(
    weights: WeightsFile, model: ViTForImageClassification, head: str = "auto", frozen: Collection[str] = ()
) -> Transfer:
    """`plan_transfer` of opened weights."""
    there = {name: spec.shape for name, spec in weights.specs.items()}
    return plan_transfer(weights.path, there, weights.facts, model.config, model.shapes, head, frozen)


def plan_transfer(
    path: Path,
    there: Mapping[str, Sequence[int]],
    config: Mapping[str, Any],
    here: ViTConfig,
    shapes: Mapping[str, Sequence[int]],
    head: str = "auto",
    frozen: Collection[str] = (),
) -> Transfer:
    """What to take of other weights.

    The classifier may have other classes, and then starts at zero; the position embedding another number of patches, and
    is resampled. Everything else must be the same.

    Args:
        path: of the weights, for messages.
        there: shape by name, under our names.
        config: of the model that they are of, as far as it is known, in ViTConfig's words (`WeightsFile.facts`).
        here: this run's model.
        shapes: its parameters'.
        head: see InitFromSection.
        frozen: names of parameters that are not trained.

    Raises:
        UserError: another width, depth, pooling…, both sides named; a classifier that is to be kept and cannot be, or starts
            at zero and is frozen.
    """
    own = {name: tuple(shape) for name, shape in shapes.items()}
    theirs = {name: tuple(shape) for name, shape in there.items()}
    _check_same_trunk(path, theirs, config, here, own)
    heads = [name for name in (KERNEL, BIAS) if name in own]
    notes, fresh, shift = list[str](), frozenset[str](), 0.0
    if heads:
        reset, note = _judge_head(path, theirs, config, here, own, head)
        notes.append(note)
        if reset:
            fresh = frozenset(heads)
            refuse_frozen_zeros(frozen, note)
        else:
            shift = float(config.get("init_head_bias", 0.0)) - here.init_head_bias
    resampled = frozenset[str]()
    if theirs[POSITIONS] != own[POSITIONS]:
        resampled = frozenset([POSITIONS])
        before, now = theirs[POSITIONS][1], own[POSITIONS][1]
        check_grids(before, now)
        notes.append(f"position embedding resampled from {before} to {now} patches")
    return Transfer(frozenset(own) - fresh - resampled, resampled, fresh, tuple(notes), shift)


def refuse_frozen_zeros(frozen: Collection[str], why: str = "the run begins from scratch") -> None:
    """UserError where a classifier that starts at zero is not trained: neither features nor gradients would ever pass it."""
    if KERNEL in frozen:
        raise UserError(f"vitds.groups freeze the classifier, and it would stay at zero: {why}")


def check_grids(before: int, now: int) -> None:
    """UserError where one of two numbers of patches is no square."""
    import torch

    with torch.device("meta"):
        resample_position_embedding(torch.empty(1, before, 1), now)


def _judge_head(
    path: Path,
    theirs: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    here: ViTConfig,
    own: Mapping[str, tuple[int, ...]],
    head: str,
) -> tuple[bool, str]:
    """Whether the classifier starts at zero, and why, in words."""
    zero, now = "classifier starts at zero", here.num_classes
    shape = theirs.get(KERNEL)
    known, names = label_names(config), label_names(here.to_dict())
    if shape is None or BIAS not in theirs:
        problem = "the weights have none"
    elif shape != own[KERNEL]:
        problem = f"{shape[0]} classes there, {now} here"
    elif head == "keep":
        return False, "classifier kept, as vitds.init_from.head says"
    elif head == "reset":
        return True, f"{zero}, as vitds.init_from.head says"
    elif known and names and known == names:
        return False, f"classifier kept: of the same {now} classes"
    elif known and names:
        return True, f"{zero}: of other classes ({_some(known)} there, {_some(names)} here)"
    else:
        side = "there" if not known else "here"
        raise UserError(
            f"vitds.init_from.head: {path} has {now} classes, as many as this run, and no names {side} tell whether they are the "
            "same; write keep (they are) or reset (the classifier starts at zero)"
        )
    if head == "keep":
        raise UserError(f"vitds.init_from.head: the classifier of {path} cannot be kept: {problem}")
    return True, f"{zero}: {problem}"


def _check_same_trunk(
    path: Path,
    theirs: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    here: ViTConfig,
    own: Mapping[str, tuple[int, ...]],
) -> None:
    """UserError unless everything but classifier and position embedding has the same names and shapes."""
    facts, ours = _facts(theirs), _facts(own)
    facts["num_heads"], ours["num_heads"] = config.get("num_heads"), here.num_heads
    apart = [
        f"{name}: {facts[name]} there, {ours[name]} here"
        for name in ours
        if facts[name] is not None and facts[name] != ours[name]
    ]
    if not apart:
        for name, shape in own.items():
            found = theirs.get(name)
            if name in (KERNEL, BIAS) or (
                name == POSITIONS and found is not None and len(found) == 3 and found[2] == shape[2]
            ):
                continue
            if found is None:
                apart.append(f"no tensor {name!r} there{nearest(name, theirs)}")
            elif found != shape:
                apart.append(f"tensor {name!r} has shape {found} there and {shape} here")
        apart += [
            f"tensor {name!r} is there, and nothing here asks for it{nearest(name, own)}"
            for name in theirs
            if name not in own and name not in (KERNEL, BIAS)
        ]
    if apart:
        more = f"; and {len(apart) - 3} more like these" if len(apart) > 3 else ""
        raise UserError(
            f"vitds.init_from.path: {path} holds another model than vitds.model: {'; '.join(apart[:3])}{more}"
        )


def _facts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What the shapes say of a model, by the keys of vitds.model; None where they do not."""

    def side(name: str, axis: int) -> int | None:
        shape = shapes.get(name, ())
        return shape[axis] if len(shape) > abs(axis) or (axis == -1 and shape) else None

    blocks = [int(name.split(".")[1]) for name in shapes if name.startswith("blocks.") and name.split(".")[1].isdigit()]
    pool = "map" if "attn_pool.latent" in shapes else "token" if "cls_token" in shapes else "gap"
    return {
        "width": side("norm.weight", -1),
        "depth": max(blocks) + 1 if blocks else None,
        "mlp_dim": side("blocks.0.mlp.fc1.bias", -1),
        "patch_size": side("patch_embed.proj.weight", -1),
        "pool": pool if blocks else None,
    }


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
