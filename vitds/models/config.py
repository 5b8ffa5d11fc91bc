"""The model's configuration: the run file's section, and the transformers config it becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PretrainedConfig

from vitds.errors import UserError, one_of
from vitds.models.losses import LOSSES
from vitds.models.shapes import Shape, variant_name, variant_shape
from vitds.sections import key

POOLS = ("map", "gap", "token")


class ViTConfig(PretrainedConfig):
    """What ViTForImageClassification is built from; saved as config.json beside the weights.

    Args:
        width, depth, mlp_dim, num_heads, patch_size: the trunk's shape; defaults are ViT-G/14.
        image_size: side of the square input in pixels; a remainder of the division by patch_size is cut off.
        pool: "map" (attention pooling), "gap" (mean over tokens) or "token" ([class] token).
        loss: "sigmoid" or "softmax" cross-entropy.
        init_head_bias: constant added to the logits.
        num_classes: the same number as transformers' num_labels; 0 builds no classifier.

    Raises:
        UserError: a value that no model can be built from.
    """

    model_type = "vitds"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "width",
        "num_hidden_layers": "depth",
        "intermediate_size": "mlp_dim",
        "num_attention_heads": "num_heads",
    }

    width: int = 1664
    depth: int = 48
    mlp_dim: int = 8192
    num_heads: int = 16
    patch_size: int = 14
    image_size: int = 224
    pool: str = "map"
    loss: str = "sigmoid"
    init_head_bias: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        num_classes = kwargs.pop("num_classes", 1000)
        if num_classes < 0:
            raise UserError(f"num_classes: {num_classes} is not possible; at least 0 (no classifier)")
        if self.id2label is None:
            kwargs.setdefault("num_labels", num_classes)
        super().__post_init__(**kwargs)
        if self.pool not in POOLS:
            raise UserError(one_of("pool", self.pool, POOLS))
        if self.loss not in LOSSES:
            raise UserError(one_of("loss", self.loss, LOSSES))
        if self.problem_type is None and self.loss == "sigmoid":  # by which transformers' pipeline chooses its scores
            self.problem_type = "multi_label_classification"
        elif self.problem_type is None and self.num_classes > 1:  # of one class it would be refused
            self.problem_type = "single_label_classification"
        if self.image_size < self.shape.patch_size:
            raise UserError(
                f"image_size: {self.image_size} is smaller than one patch; at least the patch_size, {self.patch_size}"
            )

    @property
    def shape(self) -> Shape:
        """The trunk's five numbers."""
        return Shape(self.width, self.depth, self.mlp_dim, self.num_heads, self.patch_size)

    @property
    def variant(self) -> str | None:
        """The family's name for this shape, or None."""
        return variant_name(self.shape)

    @property
    def num_patches(self) -> int:
        """Tokens per image, [class] token not counted; pixels past the last whole patch are not seen."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_classes(self) -> int:
        """Classes of the classifier; transformers' num_labels."""
        return self.num_labels or 0

    @num_classes.setter
    def num_classes(self, value: int) -> None:
        self.num_labels = value

    def name_classes(self, names: Sequence[str]) -> None:
        """Take these as the classes' names, by number, if they are as many as there are classes."""
        if len(names) == self.num_classes > 0:
            self.id2label = dict(enumerate(names))
            self.label2id = {name: number for number, name in enumerate(names)}

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON. Label names nobody chose are left out: JFT's 29,593 would fill a megabyte."""
        out = super().to_dict()
        out["num_classes"] = self.num_classes
        if self.id2label == {i: f"LABEL_{i}" for i in range(self.num_classes)}:
            out.pop("id2label", None)
            out.pop("label2id", None)
        return out


def label_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes' names in a saved config, by number; none where nobody has named them.

    Args:
        config: a config.json's content, or what `ViTConfig.to_dict` returns.
    """
    named = config.get("id2label") or {}
    names = tuple(str(named[number]) for number in sorted(named, key=int))
    return () if names == tuple(f"LABEL_{i}" for i in range(len(names))) else names


@dataclass
class ModelSection:
    """The run file's `vitds.model`."""

    variant: str | None = key(
        "ViT-G/14", 'Shape by name, "ViT-S/16"; any patch size may follow the slash; upper and lower case differ.'
    )
    width: int | None = key(None, "Model width instead of the variant's; needs mlp_dim and num_heads beside it.")
    depth: int | None = key(None, "Number of blocks instead of the variant's.")
    mlp_dim: int | None = key(None, "Hidden width of the MLPs instead of the variant's.")
    num_heads: int | None = key(None, "Attention heads instead of the variant's; must divide the width.")
    patch_size: int | None = key(None, "Side of a patch in pixels instead of the variant's.")
    num_classes: int = key(1000, "Classes of the classifier; 0 builds none.")
    pool: str = key("map", "How tokens become one vector: attention pooling, mean, or [class] token.", choices=POOLS)
    image_size: int = key(224, "Side of the input in pixels; what is left over after whole patches is not seen.")
    loss: str = key(
        "sigmoid", "Cross-entropy: sigmoid (sum over classes, labels may be multi-hot) or softmax.", choices=LOSSES
    )
    init_head_bias: float = key(
        0.0, "Constant added to the logits; −10 lets a sigmoid over many classes start near its prior."
    )

    def __post_init__(self) -> None:
        build_config(self)


def build_config(section: ModelSection) -> ViTConfig:
    """The transformers config a section describes.

    Raises:
        UserError: unknown variant, or numbers that do not fit together.
    """
    given: dict[str, Any] = {
        name: value
        for name in ("width", "depth", "mlp_dim", "num_heads", "patch_size")
        if (value := getattr(section, name)) is not None
    }
    if "width" in given and not {"mlp_dim", "num_heads"} <= given.keys():
        missing = [name for name in ("mlp_dim", "num_heads") if name not in given]
        raise UserError(f"vitds.model.width: a width of its own needs {' and '.join(missing)} beside it")
    named = vars(_named(section.variant)) if section.variant is not None else {}
    if len(given) < 5:
        if section.variant is None:
            raise UserError(
                "vitds.model.variant: missing; give a name, or all of width, depth, mlp_dim, num_heads, patch_size"
            )
        given = {**named, **given}
    for name in ("image_size", "pool", "loss", "init_head_bias", "num_classes"):
        given[name] = getattr(section, name)
    try:
        return ViTConfig(**given, architectures=["ViTForImageClassification"])
    except UserError as error:
        raise UserError(f"vitds.model.{error}") from None


def _named(variant: str) -> Shape:
    try:
        return variant_shape(variant)
    except UserError as error:
        raise UserError(f"vitds.model.{error}") from None
