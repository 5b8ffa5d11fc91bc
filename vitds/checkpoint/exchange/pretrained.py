"""A model to use, of whatever holds one: a run, a checkpoint, a Hugging Face directory, .safetensors or .npz."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from vitds.checkpoint.exchange.weights import CONFIG, open_weights
from vitds.checkpoint.files import read_json
from vitds.checkpoint.format import MODEL, step_of
from vitds.checkpoint.load import newest_checkpoint
from vitds.checkpoint.reading import agree
from vitds.errors import UserError, one_of
from vitds.layout import Shard
from vitds.models import VitdsImageProcessor, ViTForImageClassification
from vitds.models.formats.timm import timm_levels

TOLD = (
    "variant", "num_heads", "image_size", "loss", "init_head_bias", "problem_type", "id2label", "label2id",
    "width", "depth", "mlp_dim", "patch_size", "pool", "num_classes",
)  # fmt: skip
"""What a user may say of a model; what its weights show may be said, and is then compared."""
PROCESSOR = "preprocessor_config.json"
LEVELS = ("rescale_factor", "image_mean", "image_std")
"""What is taken over of somebody else's image processor."""


@dataclass(frozen=True)
class Opened:
    """A model in eval mode, and what prepares images for it."""

    model: ViTForImageClassification
    processor: VitdsImageProcessor
    path: Path
    """Of the weights: for a run's directory its newest checkpoint."""
    format: str
    """In vitds.models.formats.FORMATS."""
    step: int | None
    """Of a checkpoint; None of anything else."""


def open_model(
    path: Path | str,
    *,
    kind: str = MODEL,
    told: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    verify: str = "full",
) -> Opened:
    """A model from its weights, built on the meta device and filled a tensor at a time: nothing is held twice.

    Collective where there is a process group; every rank then has the whole model.

    Args:
        path: a run's directory (its newest whole checkpoint), a checkpoint, a Hugging Face directory, or a file.
        kind: MODEL, or EMA for the average kept beside the weights.
        told: of TOLD, what cannot be known from the weights and a config.json beside them.
        device: default the CPU.
        dtype: of the parameters.
        verify: "full" compares the content with the sums kept of it; "size" does not.

    Raises:
        UserError: nothing there, weights that cannot be right, a model that nothing describes, or told otherwise than
            they are.
    """
    given = dict(told or {})
    for name in given:
        if name not in TOLD:
            raise UserError(one_of("told", name, TOLD))
    found = weights_of(Path(path))
    weights = open_weights(found, kind, verify)
    config = weights.config(given)
    with torch.device("meta"):
        model = ViTForImageClassification(config)
    cast(nn.Module, model).to(dtype).to_empty(device=device or "cpu").eval()
    shards = [Shard(name, tuple(value.shape), value.detach().view(-1)) for name, value in model.named_parameters()]
    left = [name for name in weights.specs if name not in model.shapes]
    agree([f"tensor {name!r} is there, and nothing here asks for it" for name in left], found)
    weights.read_into(shards)
    step = None if weights.manifest is None else weights.manifest.step
    return Opened(model, processor_beside(found, config.image_size), found, weights.format.name, step)


def told_by(texts: Sequence[str]) -> dict[str, Any]:
    """What a command line's `--set KEY=VALUE` say of a model; a value is JSON, else a string.

    Raises:
        UserError: another form, or a word that is none of TOLD.
    """
    told = dict[str, Any]()
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text!r}: expected KEY=VALUE, as in num_heads=16")
        if name not in TOLD:
            raise UserError(one_of("--set", name, TOLD))
        try:
            told[name] = json.loads(value)
        except json.JSONDecodeError:
            told[name] = value
    return told


def weights_of(path: Path) -> Path:
    """The newest whole checkpoint of a run's directory; any other path as it is."""
    for directory in (path / "checkpoints", path):
        if directory.is_dir() and any(step_of(entry.name) is not None for entry in directory.iterdir()):
            checkpoint = newest_checkpoint(directory, verify="size")  # what is read of it is hashed when it is opened
            assert checkpoint is not None, directory
            return checkpoint.path
    if (path / "checkpoints").is_dir():
        raise UserError(f"{path}: a run's directory without any checkpoint")
    return path


def processor_beside(path: Path, image_size: int) -> VitdsImageProcessor:
    """The one saved beside the weights, if it is ours and of this size; else the usual one for the size, with the mean and
    standard deviation of whatever is saved there, timm's config.json too.

    Raises:
        UserError: a file that does not describe an image processor.
    """
    place = path if path.is_dir() else path.parent
    file = next((place / name for name in (PROCESSOR, CONFIG) if (place / name).is_file()), None)
    if file is None or path.suffix == ".npz":
        return VitdsImageProcessor(crop_size=image_size)
    saved = read_json(file)
    if file.name == CONFIG:
        saved = timm_levels(saved)
    try:
        processor = VitdsImageProcessor(crop_size=image_size, **{word: saved[word] for word in LEVELS if word in saved})
        if saved.get("image_processor_type") == VitdsImageProcessor.__name__:
            ours = VitdsImageProcessor.from_dict(saved)
            processor = ours if ours.crop_size["height"] == image_size else processor
        with np.errstate(divide="ignore", invalid="ignore"):
            levels = np.stack(processor.levels)
        if levels.shape != (2, 3) or not np.isfinite(levels).all() or (levels[0] <= 0).any():
            raise ValueError(f"image_mean {processor.image_mean}, image_std {processor.image_std}")
    except (UserError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{file}: not what an image processor is made of: {error}") from None
    return processor
