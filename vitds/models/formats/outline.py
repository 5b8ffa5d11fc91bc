"""What can be known of a model from the names and shapes of its weights, and what has to be told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitds.errors import UserError
from vitds.models.config import ViTConfig
from vitds.models.shapes import VARIANTS, Shape, variant_name, variant_shape


@dataclass(frozen=True)
class Outline:
    """A model as its weights show it. Heads do not show in fused or two-dimensional kernels: then None."""

    width: int
    depth: int
    mlp_dim: int
    patch_size: int
    num_patches: int
    pool: str
    num_classes: int
    num_heads: int | None = None

    @classmethod
    def of(cls, config: ViTConfig) -> Outline:
        """The outline of a model that is known."""
        shape = config.shape
        return cls(
            shape.width, shape.depth, shape.mlp_dim, shape.patch_size,
            config.num_patches, config.pool, config.num_classes, shape.num_heads,
        )  # fmt: skip


def our_shapes(outline: Outline) -> dict[str, tuple[int, ...]]:
    """Our names and shapes (`ViTForImageClassification.shapes`) of a model, without building it."""
    width, mlp = outline.width, outline.mlp_dim

    def linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    def perceptron(name: str) -> dict[str, tuple[int, ...]]:
        return linear(f"{name}.fc1", mlp, width) | linear(f"{name}.fc2", width, mlp)

    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, outline.num_patches, width)}
    if outline.pool == "token":
        shapes["cls_token"] = (1, 1, width)
    shapes["patch_embed.proj.weight"] = (width, 3, outline.patch_size, outline.patch_size)
    shapes["patch_embed.proj.bias"] = (width,)
    for i in range(outline.depth):
        block = f"blocks.{i}"
        shapes |= norm(f"{block}.norm1") | linear(f"{block}.attn.qkv", 3 * width, width)
        shapes |= linear(f"{block}.attn.proj", width, width) | norm(f"{block}.norm2") | perceptron(f"{block}.mlp")
    shapes |= norm("norm")
    if outline.pool == "map":
        shapes["attn_pool.latent"] = (1, 1, width)
        shapes |= linear("attn_pool.q", width, width) | linear("attn_pool.kv", 2 * width, width)
        shapes |= linear("attn_pool.proj", width, width) | norm("attn_pool.norm") | perceptron("attn_pool.mlp")
    if outline.num_classes:
        shapes |= linear("head", outline.num_classes, width)
    return shapes


KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("width", "depth", "mlp_dim", "num_heads", "patch_size", "image_size", "num_classes"), (int,)),
    **dict.fromkeys(("pool", "loss", "variant", "problem_type"), (str,)),
    "init_head_bias": (int, float),
    "id2label": (dict,),
    "label2id": (dict,),
}
"""What a told word's value has to be."""


def check_words(told: Mapping[str, Any]) -> None:
    """UserError for a value that is not of its word's kind."""
    for name, value in told.items():
        kinds = KINDS.get(name, (object,))
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and object not in kinds)):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise UserError(f"{name}: {value!r} is not possible; expected {expected}")
        if name == "id2label" and isinstance(value, dict) and not all(isinstance(one, str) for one in value.values()):
            raise UserError(f"{name}: {str(value)[:60]} is not possible; expected names")


def config_of(outline: Outline, told: Mapping[str, Any]) -> ViTConfig:
    """The configuration of a model: what its weights show, and of the rest what is told.

    Args:
        outline: from names and shapes.
        told: ViTConfig's words (num_heads, image_size, loss, id2label, …), and `variant`.

    Raises:
        UserError: something told is not what the weights show (both are named); heads that nothing tells.
    """
    check_words(told)
    given = {name: value for name, value in told.items() if value is not None}
    if "variant" in given:
        named = variant_shape(given.pop("variant"))
        given = {**vars(named), **given}
    shown = {
        name: getattr(outline, name) for name in ("width", "depth", "mlp_dim", "patch_size", "pool", "num_classes")
    }
    if outline.num_heads is not None:
        shown["num_heads"] = outline.num_heads
    for name, value in shown.items():
        if given.get(name, value) != value:
            raise UserError(f"{name}: {given[name]!r} is told, and the weights have {value!r}")
    names = given.get("id2label")
    if names is not None and len(names) != outline.num_classes:
        raise UserError(f"id2label: {len(names)} names are told, and the weights have {outline.num_classes} classes")
    if "num_heads" not in shown | given:
        shown["num_heads"] = _usual_heads(outline)
    shown["image_size"] = _image_size(outline, given.get("image_size"))
    return ViTConfig(**{**given, **shown, "architectures": ["ViTForImageClassification"]})


def _image_size(outline: Outline, told: int | None) -> int:
    side = math.isqrt(outline.num_patches)
    if side * side != outline.num_patches:
        raise UserError(f"pos_embed: {outline.num_patches} patches are no square; only square images are known here")
    if told is None:
        return side * outline.patch_size
    if told // outline.patch_size != side:
        raise UserError(
            f"image_size: {told} is told, and the weights have {side}×{side} patches of {outline.patch_size} pixels, "
            f"which is {side * outline.patch_size}"
        )
    return told


def _usual_heads(outline: Outline) -> int:
    """The heads of the family's member of this width, depth and MLP: nothing in fused weights tells them."""
    for shape in VARIANTS.values():
        if (shape.width, shape.depth, shape.mlp_dim) == (outline.width, outline.depth, outline.mlp_dim):
            return shape.num_heads
    raise UserError(
        f"num_heads: the weights do not tell it, and no variant is {outline.width} wide, {outline.depth} deep, with an MLP "
        f"of {outline.mlp_dim}; say --set num_heads=N (or keep config.json beside the weights)"
    )


def description(outline: Outline) -> str:
    """A model in words: "ViT-L/16, map pooling, 1000 classes"."""
    name = None
    if outline.num_heads is not None and outline.width % outline.num_heads == 0:
        name = variant_name(Shape(outline.width, outline.depth, outline.mlp_dim, outline.num_heads, outline.patch_size))
    if name is None:
        heads = "" if outline.num_heads is None else f", {outline.num_heads} heads"
        name = (
            f"{outline.width} wide, {outline.depth} deep, MLP {outline.mlp_dim}{heads}, patches of {outline.patch_size}"
        )
    return f"{name}, {outline.pool} pooling, {outline.num_classes} classes"
