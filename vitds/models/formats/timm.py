"""timm's Vision Transformers: our own names, beside parts of theirs that ours have not.

Taken in besides our names: a position embedding with an entry for the [class] token (timm's default), which is added to
the token, as the reference does with its old checkpoints. Refused, each with its reason: layer norms before the blocks
or after the pooling, layer scale, normalised queries and keys, registers, a second head for distillation.

Weights do not say which GELU they were trained with. timm's own ViTs use the exact one unless they are built with
act_layer='gelu_tanh', ours the tanh form: logits then differ by some 5e-4 (docs/formats.md).
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from vitds.errors import UserError
from vitds.models.card import TIMM_NAMES, timm_call
from vitds.models.config import ViTConfig
from vitds.models.formats.ours import Ours, our_outline
from vitds.models.formats.outline import Outline, our_shapes
from vitds.models.formats.ties import check
from vitds.models.formats.words import Conversion, Part, Piece, Shapes, one
from vitds.models.shapes import variant_shape

FOREIGN = (
    (r"fc_norm\..*", "it normalises after the pooling, this model before it (timm's fc_norm=False)"),
    (r"norm_pre\..*", "it normalises before the blocks"),
    (r"blocks\.\d+\.(ls[12]\.gamma|gamma_[12])", "it scales its branches (LayerScale)"),
    (r"(blocks\.\d+\.attn|attn_pool)\.[qk]_norm\..*", "it normalises queries and keys"),
    (r"reg_token", "it has registers"),
    (r"(dist_token|head_dist\..*)", "it has a token for distillation"),
    (r"attn_pool\.pos_embed", "its attention pooling has a position embedding"),
    (r"blocks\.\d+\.mlp\.(fc1_[gx]|norm|w12|w3)\..*", "its MLPs are gated or normalised"),
)
"""Tensors of models that compute something else, and what."""
POOLS = {"map": "map", "avg": "gap", "token": "token"}
"""timm's words for ours. Of a model with a [class] token weights do not tell "avg" from "token"."""


class Timm:
    """Format "timm"."""

    name = "timm"

    def recognise(self, shapes: Shapes) -> bool:
        """timm's names of a patch embedding and a fused attention, of a Vision Transformer of any kind."""
        return "patch_embed.proj.weight" in shapes and "blocks.0.attn.qkv.weight" in shapes

    def outline(self, shapes: Shapes) -> Outline:
        """As of our names; a position that is the [class] token's is no patch."""
        outline = our_outline(shapes)
        patches = outline.num_patches - _has_own_position(outline)
        return Outline(**{**vars(outline), "num_patches": patches})

    def told(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Heads and image size of a config.json as timm writes it for the hub."""
        name = saved.get("architecture")
        if not isinstance(name, str):
            return {}
        arguments, pretrained = (_section(saved, key) for key in ("model_args", "pretrained_cfg"))
        told: dict[str, Any] = {}
        variant = next((ours for ours, theirs in TIMM_NAMES.items() if _stem(theirs) == _stem(name)), None)
        heads = arguments.get("num_heads")
        if heads is None and variant is not None and "embed_dim" not in arguments:
            heads = variant_shape(variant).num_heads
        size = arguments.get("img_size") or (pretrained.get("input_size") or (None,))[-1]
        for key, value in (("num_heads", heads), ("image_size", size)):
            if isinstance(value, int):
                told[key] = value
        pool = POOLS.get(str(arguments.get("global_pool", saved.get("global_pool"))))
        if pool is not None:
            told["pool"] = pool
        labels = saved.get("label_names") or pretrained.get("label_names")
        if isinstance(labels, list) and len(labels) == saved.get("num_classes"):
            told["id2label"] = dict(enumerate(labels))
        return told

    def incoming(self, shapes: Shapes) -> dict[str, Conversion]:
        """Every tensor is itself, but for the [class] token's position."""
        for name in shapes:
            for pattern, reason in FOREIGN:
                if re.fullmatch(pattern, name):
                    raise UserError(f"tensor {name!r}: {reason}; such a model cannot be loaded here")
        there, outline = our_outline(shapes), self.outline(shapes)
        expected = our_shapes(outline)
        made = {name: Conversion(shape, (one(shape, Piece(name)),)) for name, shape in expected.items()}
        if _has_own_position(there):
            position = (1, there.num_patches, there.width)
            made["pos_embed"] = Conversion(
                expected["pos_embed"],
                (one(expected["pos_embed"], Piece("pos_embed"), lambda whole: whole[:, 1:]),),
            )
            pieces = (Piece("cls_token"), Piece("pos_embed"))
            made["cls_token"] = Conversion(expected["cls_token"], (Part(expected["cls_token"], pieces, _placed),))
            expected = {**expected, "pos_embed": position}
        check(expected, shapes)
        return made

    def outgoing(self, config: ViTConfig, **options: Any) -> dict[str, Conversion]:
        """Ours, init_head_bias in the head's bias."""
        return Ours().outgoing(config, **options)


def _placed(pieces: list[torch.Tensor]) -> torch.Tensor:
    """The [class] token and its position."""
    token, position = pieces
    return token + position[:, :1]


def _has_own_position(outline: Outline) -> bool:
    """Whether the [class] token has an entry in the position embedding: patches alone are a square."""
    side = math.isqrt(outline.num_patches)
    return outline.pool == "token" and side * side == outline.num_patches - 1


def _section(saved: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = saved.get(key)
    return found if isinstance(found, Mapping) else {}


def timm_levels(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and standard deviation, by an image processor's words, of a config.json as timm writes it; {} of any other."""
    pretrained = _section(saved, "pretrained_cfg") if isinstance(saved.get("architecture"), str) else {}
    words = (("image_mean", "mean"), ("image_std", "std"))
    return {ours: pretrained[theirs] for ours, theirs in words if theirs in pretrained}


def _stem(name: str) -> str:
    """`vit_base` of `vit_base_patch16_224.augreg_in21k`."""
    return name.partition("_patch")[0]


def timm_config(config: ViTConfig, processor: Mapping[str, Any]) -> dict[str, Any]:
    """config.json that `timm.create_model('local-dir:DIRECTORY', pretrained=True)` builds the model from.

    Args:
        processor: VitdsImageProcessor.to_dict(): size before the crop, mean, standard deviation, filter.
    """
    name, arguments = timm_arguments(config)
    size, crop = config.image_size, processor["crop_size"]["height"]
    return {
        "architecture": name, "num_classes": config.num_classes, "num_features": config.width, "model_args": arguments,
        "pretrained_cfg": {
            "architecture": name, "num_classes": config.num_classes, "input_size": [3, size, size], "fixed_input_size": True,
            "interpolation": {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}.get(processor["resample"], "bilinear"),
            "crop_pct": crop / processor["size"]["shortest_edge"], "crop_mode": "center",
            "mean": processor["image_mean"], "std": processor["image_std"],
            "first_conv": "patch_embed.proj", "classifier": "head", "pool_size": None,
        },
    }  # fmt: skip


def timm_arguments(config: ViTConfig) -> tuple[str, dict[str, Any]]:
    """The architecture's name and the keyword arguments of the card's `timm.create_model` call."""
    call = ast.parse(timm_call(config), mode="eval").body
    assert isinstance(call, ast.Call)
    arguments = {word.arg: _number(word.value) for word in call.keywords if word.arg not in (None, "num_classes")}
    return ast.literal_eval(call.args[0]), arguments  # type: ignore[return-value]


def _number(node: ast.expr) -> Any:
    """A literal, or a quotient of two: `mlp_ratio=1536/384`."""
    if isinstance(node, ast.BinOp):
        return ast.literal_eval(node.left) / ast.literal_eval(node.right)
    return ast.literal_eval(node)
