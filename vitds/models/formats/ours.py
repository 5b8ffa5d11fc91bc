"""Our own names: timm's, as vitds.models.vit declares them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from vitds.errors import UserError
from vitds.models.config import ViTConfig
from vitds.models.formats.outline import Outline, our_shapes
from vitds.models.formats.ties import check, numbered
from vitds.models.formats.words import Conversion, Part, Piece, Shapes, one


class Ours:
    """Format "vitds": a checkpoint's weights, or a file of them."""

    name = "vitds"

    def recognise(self, shapes: Shapes) -> bool:
        """Our names, and a position embedding of patches alone; timm's other models are left to format "timm"."""
        position = shapes.get("pos_embed", ())
        return (
            {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight"} <= set(shapes)
            and len(position) == 3
            and math.isqrt(position[1]) ** 2 == position[1]
        )

    def outline(self, shapes: Shapes) -> Outline:
        """What names and shapes tell; heads do not show."""
        return our_outline(shapes)

    def told(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """All of a config.json of ours; nothing of anyone else's."""
        if saved.get("model_type") != ViTConfig.model_type:
            return {}
        passed_over = ("model_type", "architectures", "transformers_version", "dtype", "num_labels")
        return {name: value for name, value in saved.items() if name not in passed_over}

    def incoming(self, shapes: Shapes) -> dict[str, Conversion]:
        """Every tensor is itself."""
        expected = our_shapes(self.outline(shapes))
        check(expected, shapes)
        return {name: Conversion(shape, (one(shape, Piece(name)),)) for name, shape in expected.items()}

    def outgoing(self, config: ViTConfig, **options: Any) -> dict[str, Conversion]:
        """Every tensor is itself, but for the head's bias, which takes in init_head_bias: the file stands alone."""
        if options:
            raise UserError(f"{next(iter(options))}: format {self.name!r} has no such option")
        shapes = our_shapes(Outline.of(config))
        return {name: Conversion(shape, (whole_part(name, shape, config),)) for name, shape in shapes.items()}


def whole_part(name: str, shape: tuple[int, ...], config: ViTConfig) -> Part:
    """One of our tensors as it goes out: unchanged, init_head_bias taken into the head's bias."""
    return (
        with_constant(one(shape, Piece(name)), config.init_head_bias)
        if name == "head.bias"
        else one(shape, Piece(name))
    )


def with_constant(part: Part, constant: float) -> Part:
    """A part to which a constant is added; itself where that is 0."""
    if constant == 0:
        return part

    def added(pieces: list[torch.Tensor]) -> torch.Tensor:
        return part.combine(pieces) + constant

    return part._replace(combine=added)


def our_outline(shapes: Shapes) -> Outline:
    """The outline of a model with our names.

    Raises:
        UserError: a tensor without which nothing can be told, or one with another number of axes.
    """
    position = axes(shapes, "pos_embed", 3)
    patches = axes(shapes, "patch_embed.proj.weight", 4)
    depth = numbered(shapes, "blocks.", ".attn.qkv.weight")
    axes(shapes, "blocks.0.attn.qkv.weight", 2)
    pool = "map" if "attn_pool.latent" in shapes else "token" if "cls_token" in shapes else "gap"
    classes = axes(shapes, "head.weight", 2)[0] if "head.weight" in shapes else 0
    mlp_dim = axes(shapes, "blocks.0.mlp.fc1.weight", 2)[0]
    return Outline(patches[0], depth, mlp_dim, patches[-1], position[1], pool, classes)


def axes(shapes: Shapes, name: str, count: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there, with `count` axes, none of them empty (UserError)."""
    if name not in shapes:
        raise UserError(f"no tensor {name!r} there")
    if len(shapes[name]) != count or 0 in shapes[name]:
        raise UserError(f"tensor {name!r} has shape {tuple(shapes[name])} there; {count} axes were expected")
    return tuple(shapes[name])
