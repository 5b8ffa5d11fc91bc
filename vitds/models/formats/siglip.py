"""SigLIP's vision tower as transformers stores it: the trunk and MAP head are the same arithmetic as ours.

Key layouts: transformers 4.x and every published checkpoint write `vision_model.…`, also within the full model beside a
text tower, which is left out here on purpose; `SiglipVisionModel` of 5.x writes the same names without the prefix. We
write the prefix: both read it. A MAP model is a `SiglipVisionModel` (pooler_output are our features; it has no place
for a classifier); `SiglipForImageClassification` takes the mean over the tokens, so it holds a "gap" model, classifier
and all. (SiglipMultiheadAttentionPoolingHead, SiglipForImageClassification in transformers 5.17.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vitds.errors import UserError
from vitds.models.config import ViTConfig
from vitds.models.formats.ours import axes, with_constant
from vitds.models.formats.outline import Outline, our_shapes
from vitds.models.formats.ties import Tie, check, incoming, numbered, outgoing, their_shapes
from vitds.models.formats.words import Conversion, Piece, Shapes
from vitds.models.layers import EPSILON

PREFIX = "vision_model."
PATCHES = "embeddings.patch_embedding.weight"
ACTIVATION = "gelu_pytorch_tanh"
LEFT_OUT = ("text_model.", "logit_scale", "logit_bias")
"""Of the full model: what says how images and texts are compared, and not what an image is."""
KEPT_ELSEWHERE = "embeddings.position_ids"
"""A row of counts, 0 to N − 1, that old versions stored."""


class Siglip:
    """Format "siglip"."""

    name = "siglip"

    def recognise(self, shapes: Shapes) -> bool:
        """A patch embedding of SigLIP's name, with or without prefix, and its final norm's."""
        prefix = _prefix(shapes)
        return f"{prefix}{PATCHES}" in shapes and f"{prefix}post_layernorm.weight" in shapes

    def outline(self, shapes: Shapes) -> Outline:
        """With a classifier the tokens' mean is classified and the MAP head, where there is one, has no part in it."""
        prefix = _prefix(shapes)
        patches = axes(shapes, f"{prefix}{PATCHES}", 4)
        position = axes(shapes, f"{prefix}embeddings.position_embedding.weight", 2)
        layers = f"{prefix}encoder.layers."
        depth = numbered(shapes, layers, ".self_attn.q_proj.weight")
        mlp_dim = axes(shapes, f"{layers}0.mlp.fc1.weight", 2)[0]
        classes = axes(shapes, "classifier.weight", 2)[0] if "classifier.weight" in shapes else 0
        pool = "map" if not classes and f"{prefix}head.probe" in shapes else "gap"
        return Outline(patches[0], depth, mlp_dim, patches[-1], position[0], pool, classes)

    def told(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Heads, image size and classes' names of SiglipConfig's or SiglipVisionConfig's JSON.

        Raises:
            UserError: images that are not square, another activation or epsilon than ours, which no conversion of weights can make up for.
        """
        if saved.get("model_type") not in ("siglip", "siglip_vision_model"):
            return {}
        vision = saved["vision_config"] if isinstance(saved.get("vision_config"), Mapping) else saved
        for name, ours in (("hidden_act", ACTIVATION), ("layer_norm_eps", EPSILON), ("num_channels", 3)):
            if vision.get(name, ours) != ours:
                raise UserError(f"config.json: {name} is {vision[name]!r}; this model computes with {ours!r}")
        told: dict[str, Any] = {
            "num_heads": vision.get("num_attention_heads", 12),
            "image_size": vision.get("image_size", 224),
        }
        for name, value in told.items():
            if type(value) is not int or value < 1:
                raise UserError(f"config.json: {name} is {value!r}, a number was expected")
        names, classes = saved.get("id2label"), saved.get("architectures")
        if isinstance(classes, list) and "SiglipForImageClassification" in classes and names:
            if not isinstance(names, Mapping) or not all(str(number).isdecimal() for number in names):
                raise UserError(f"config.json: id2label is {str(names)[:60]}, names by number were expected")
            told["id2label"] = {int(number): label for number, label in names.items()}
            told["loss"] = "sigmoid" if saved.get("problem_type") == "multi_label_classification" else "softmax"
        return told

    def incoming(self, shapes: Shapes) -> dict[str, Conversion]:
        """Ours of theirs; the text tower, the scale of comparisons and, beside a classifier, the MAP head are left out."""
        prefix, outline = _prefix(shapes), self.outline(shapes)
        table = list(_table(outline, prefix))
        unused = (*LEFT_OUT, f"{prefix}head.") if outline.num_classes else LEFT_OUT
        check(
            their_shapes(table),
            {
                name: shape
                for name, shape in shapes.items()
                if not name.startswith(unused) and name != f"{prefix}{KEPT_ELSEWHERE}"
            },
        )
        return incoming(table, our_shapes(outline))

    def outgoing(self, config: ViTConfig, **options: Any) -> dict[str, Conversion]:
        """Theirs of ours: a MAP model without its classifier, or a "gap" model with it.

        Raises:
            UserError: a [class] token, which SigLIP has not.
        """
        if options:
            raise UserError(f"{next(iter(options))}: format {self.name!r} has no such option")
        if config.pool == "token":
            raise UserError("pool: SigLIP has no [class] token; a model with pool 'map' or 'gap' can be written")
        table = list(_table(_held(Outline.of(config)), PREFIX))
        theirs = outgoing(table, their_shapes(table))
        if "classifier.bias" in theirs:
            shape, (part,) = theirs["classifier.bias"]
            theirs["classifier.bias"] = Conversion(shape, (with_constant(part, config.init_head_bias),))
        return theirs


def _prefix(shapes: Shapes) -> str:
    return PREFIX if any(name.startswith(PREFIX) for name in shapes) else ""


def _held(outline: Outline) -> Outline:
    """What SigLIP can hold of a model."""
    return Outline(**{**vars(outline), "num_classes": 0}) if outline.pool == "map" else outline


def _table(outline: Outline, prefix: str) -> Iterator[Tie]:
    """Every tensor of theirs beside ours."""
    width, shapes = outline.width, our_shapes(outline)

    def whole(theirs: str, ours: str) -> Iterator[Tie]:
        for end in ("weight", "bias"):
            shape = shapes[f"{ours}.{end}"]
            yield Tie(Piece(f"{theirs}.{end}"), Piece(f"{ours}.{end}"), shape, shape)

    yield from whole(f"{prefix}embeddings.patch_embedding", "patch_embed.proj")
    yield Tie(
        Piece(f"{prefix}embeddings.position_embedding.weight"), Piece("pos_embed"),
        (outline.num_patches, width), shapes["pos_embed"], lambda rows: rows[None], lambda rows: rows[0],
    )  # fmt: skip
    for i in range(outline.depth):
        layer, block = f"{prefix}encoder.layers.{i}", f"blocks.{i}"
        yield from whole(f"{layer}.layer_norm1", f"{block}.norm1")
        for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
            rows = (part * width, (part + 1) * width)
            for end, shape in (("weight", (width, width)), ("bias", (width,))):
                there, here = Piece(f"{layer}.self_attn.{name}.{end}"), Piece(f"{block}.attn.qkv.{end}", rows)
                yield Tie(there, here, shape, shape)
        yield from whole(f"{layer}.self_attn.out_proj", f"{block}.attn.proj")
        yield from whole(f"{layer}.layer_norm2", f"{block}.norm2")
        for name in ("fc1", "fc2"):
            yield from whole(f"{layer}.mlp.{name}", f"{block}.mlp.{name}")
    yield from whole(f"{prefix}post_layernorm", "norm")
    if outline.pool == "map":
        yield from _pooling(f"{prefix}head", shapes, width)
        for theirs, ours in (("attention.out_proj", "proj"), ("layernorm", "norm"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):  # fmt: skip
            yield from whole(f"{prefix}head.{theirs}", f"attn_pool.{ours}")
    if outline.num_classes:
        yield from whole("classifier", "head")


def _pooling(head: str, shapes: Shapes, width: int) -> Iterator[Tie]:
    """The probe, and torch.nn.MultiheadAttention's fused q, k and v beside our q and kv."""
    yield Tie(Piece(f"{head}.probe"), Piece("attn_pool.latent"), shapes["attn_pool.latent"], shapes["attn_pool.latent"])
    for end in ("weight", "bias"):
        for ours, rows in (("q", (0, width)), ("kv", (width, 3 * width))):
            shape = shapes[f"attn_pool.{ours}.{end}"]
            yield Tie(Piece(f"{head}.attention.in_proj_{end}", rows), Piece(f"attn_pool.{ours}.{end}"), shape, shape)


def siglip_config(config: ViTConfig) -> dict[str, Any]:
    """config.json of the stock class that computes what `config` describes: SiglipVisionModel for a MAP model or one
    without classifier, SiglipForImageClassification for a "gap" model with one."""
    classified = config.pool == "gap" and config.num_classes > 0
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": config.width, "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.depth, "num_attention_heads": config.num_heads, "num_channels": 3,
        "image_size": config.image_size, "patch_size": config.patch_size, "hidden_act": ACTIVATION,
        "layer_norm_eps": EPSILON, "attention_dropout": 0.0, "vision_use_head": config.pool == "map",
    }  # fmt: skip
    if not classified:
        return {"architectures": ["SiglipVisionModel"], **vision}
    labels = {str(number): str(label) for number, label in (config.id2label or {}).items()}
    return {
        "architectures": ["SiglipForImageClassification"], "model_type": "siglip", "vision_config": vision,
        "id2label": labels, "label2id": {label: int(number) for number, label in labels.items()},
        "problem_type": config.problem_type,
    }  # fmt: skip


def stock_processor(processor: Mapping[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json of transformers' own CLIPImageProcessor that does what ours does.

    Shortest edge, crop, filter, mean and standard deviation are the same; SiglipImageProcessor of 4.x cannot crop. Of a
    size that does not divide, theirs cuts the longer edge where ours rounds it: then one pixel may differ.

    Args:
        processor: VitdsImageProcessor.to_dict().
    """
    kept = ("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")
    steps = ("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize")
    return {
        "image_processor_type": "CLIPImageProcessor",
        **dict.fromkeys(steps, True),
        **{name: processor[name] for name in kept},
    }


def lost(config: ViTConfig) -> list[str]:
    """What of a model does not go into SigLIP's format, a sentence each."""
    if config.pool == "map" and config.num_classes:
        return [
            f"the classifier ({config.num_classes} classes) is left out: SigLIP has no classifier on its MAP head; "
            "pooler_output are the features it takes"
        ]
    return []
