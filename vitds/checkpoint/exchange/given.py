"""A model that is to be converted: opened, told what its weights do not say, and changed if that is asked for."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vitds.checkpoint.exchange.pretrained import processor_beside, weights_of
from vitds.checkpoint.exchange.weights import WeightsFile, open_weights
from vitds.checkpoint.format import EMA, MODEL
from vitds.errors import UserError
from vitds.models import ViTConfig, VitdsImageProcessor, ViTForImageClassification, resample_position_embedding
from vitds.models.formats import Outline, Piece, our_shapes

README = "README.md"
HEAD, POSITIONS = ("head.weight", "head.bias"), "pos_embed"


@dataclass(frozen=True)
class Given:
    """The model as it will be written: `read` gives pieces of our tensors, in our names, a piece at a time."""

    weights: WeightsFile
    config: ViTConfig
    processor: VitdsImageProcessor
    fresh_head: bool
    changes: tuple[str, ...]
    """What is not as it was, in words."""
    card: str | None = None
    """What the README beside the weights says of this very model: how it came about, what it is worth; None where there is
    none, or where it is of another model."""

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Our names and shapes."""
        return our_shapes(Outline.of(self.config))

    def read(self, piece: Piece) -> torch.Tensor:
        """A piece of one of our tensors, fp32 on the CPU.

        Raises:
            UserError: the file is damaged.
        """
        shape, rows = self.shapes[piece.key], piece.rows
        if piece.key in HEAD and self.fresh_head:
            return _rows(torch.zeros(shape), rows)
        if piece.key == POSITIONS and self.weights.outline.num_patches != shape[1]:
            whole = self.weights.read_tensor(POSITIONS).view(self.weights.specs[POSITIONS].shape)
            return _rows(resample_position_embedding(whole, shape[1]), rows)
        if rows is None:
            return self.weights.read_tensor(piece.key).view(shape)
        first, last = (rows, rows + 1) if isinstance(rows, int) else rows
        row = math.prod(shape[1:])
        taken = self.weights.read_tensor(piece.key, first * row, (last - first) * row)
        return taken.view(shape[1:] if isinstance(rows, int) else (last - first, *shape[1:]))

    @torch.no_grad()
    def model(self) -> ViTForImageClassification:
        """The model in memory, fp32 on the CPU, in evaluation."""
        with torch.device("meta"):
            model = ViTForImageClassification(self.config)
        model.to_empty(device="cpu")
        for name, parameter in model.named_parameters():
            parameter.copy_(self.read(Piece(name)))
        return model.eval()


def given(
    path: Path,
    *,
    ema: bool = False,
    told: Mapping[str, Any] | None = None,
    classes: int | None = None,
    image_size: int | None = None,
) -> Given:
    """Open what is to be converted; the content is compared with its sums where it has some.

    Args:
        path: a run (its newest checkpoint), or whatever `open_weights` opens.
        ema: the average kept beside the weights.
        told: ViTConfig's words for what the weights do not say (num_heads, variant, image_size, loss).
        classes: of the model that is written; another number than there is starts with a classifier of zeros.
        image_size: of the model that is written; the position embedding is resampled.

    Raises:
        UserError: nothing there, damage, or a model that is not known well enough.
    """
    path = weights_of(path)
    weights = open_weights(path, EMA if ema else MODEL)
    there = weights.config(dict(told or {}))
    config, processor, changes = there, processor_beside(path, there.image_size), []
    if classes is not None and classes != there.num_classes:
        ended = ("id2label", "label2id", "num_labels", "problem_type")  # of one class it is another
        kept = {name: value for name, value in there.to_dict().items() if name not in ended}
        config = ViTConfig(**{**kept, "num_classes": classes, "architectures": ["ViTForImageClassification"]})
        changes.append(f"the classifier has {classes} classes and starts at zero; there were {there.num_classes}" if classes
                       else f"the classifier ({there.num_classes} classes) is left out")  # fmt: skip
    if image_size is not None and image_size != there.image_size:
        before = config.num_patches
        config = copy.deepcopy(config)
        if image_size < config.patch_size:
            raise UserError(f"--image-size: {image_size} is smaller than one patch of {config.patch_size} pixels")
        config.image_size = image_size
        edge = round(processor.size["shortest_edge"] * image_size / processor.crop_size["height"])
        processor = VitdsImageProcessor(
            **{**_words(processor.to_dict()), "crop_size": image_size, "size": max(edge, image_size)}
        )
        if config.num_patches != before:
            changes.append(f"position embedding resampled from {before} to {config.num_patches} patches")
    same = config is there and not ema and not told and weights.format.name == "vitds"
    card = path / README if same and path.is_dir() else None
    text = card.read_text(encoding="utf-8", errors="replace") if card is not None and card.is_file() else None
    return Given(weights, config, processor, classes not in (None, there.num_classes), tuple(changes), text)


def _words(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The image processor's own arguments of its JSON."""
    words = ("crop_size", "size", "resample", "rescale_factor", "image_mean", "image_std")
    return {name: saved[name] for name in words if name in saved}


def _rows(whole: torch.Tensor, rows: int | tuple[int, int] | None) -> torch.Tensor:
    return whole if rows is None else whole[rows] if isinstance(rows, int) else whole[rows[0] : rows[1]]
