"""The family's shapes by name, and what follows from a shape by arithmetic: parameters and FLOPs.

Sizes: "Scaling Vision Transformers" (arXiv 2106.04560), Table 2, and the extra sizes of the authors' released code.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vitds.errors import UserError, nearest

if TYPE_CHECKING:
    from vitds.models.config import ViTConfig


@dataclass(frozen=True)
class Shape:
    """The five numbers that make a Vision Transformer's trunk.

    Raises:
        UserError: a number below 1, or heads that do not divide the width.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise UserError(f"{name}: {value} is not possible; at least 1")
        if self.width % self.num_heads:
            raise UserError(
                f"num_heads: {self.num_heads} heads do not divide the width {self.width}; "
                f"allowed: {', '.join(str(n) for n in range(1, 129) if self.width % n == 0)}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.num_heads


# fmt: off
VARIANTS: dict[str, Shape] = {
    #                        width depth mlp_dim heads patch
    "ViT-mu/16":     Shape(     32,    1,    128,    2,   16),
    "ViT-s/28":      Shape(    256,    6,   1024,    8,   28),
    "ViT-s/16":      Shape(    256,    6,   1024,    8,   16),
    "ViT-Ti/16":     Shape(    192,   12,    768,    3,   16),
    "ViT-S/32":      Shape(    384,   12,   1536,    6,   32),
    "ViT-S/16":      Shape(    384,   12,   1536,    6,   16),
    "ViT-M/16":      Shape(    512,   12,   2048,    8,   16),
    "ViT-B/32":      Shape(    768,   12,   3072,   12,   32),
    "ViT-B/28":      Shape(    768,   12,   3072,   12,   28),
    "ViT-B/16":      Shape(    768,   12,   3072,   12,   16),
    "ViT-L/16":      Shape(   1024,   24,   4096,   16,   16),
    "ViT-So400m/14": Shape(   1152,   27,   4304,   16,   14),
    "ViT-H/14":      Shape(   1280,   32,   5120,   16,   14),
    "ViT-g/14":      Shape(   1408,   40,   6144,   16,   14),
    "ViT-g-opt/16":  Shape(   1536,   40,   6144,   16,   16),
    "ViT-G/14":      Shape(   1664,   48,   8192,   16,   14),
    "ViT-G-opt/16":  Shape(   1536,   48,   8192,   16,   16),
    "ViT-e/14":      Shape(   1792,   56,  15360,   16,   14),
}
# fmt: on


def variant_shape(name: str) -> Shape:
    """The shape behind a name. Any patch size may follow a known size: "ViT-S/8". Case matters: g is not G.

    Raises:
        UserError: unknown name.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    size, _, patch = name.partition("/")
    sizes = {known.partition("/")[0]: shape for known, shape in VARIANTS.items()}
    if size in sizes and re.fullmatch(r"[1-9]\d*", patch):
        return dataclasses.replace(sizes[size], patch_size=int(patch))
    raise UserError(
        f"variant: {name!r} is not known{nearest(name, VARIANTS)}; allowed: {', '.join(VARIANTS)}, "
        "and these sizes with any other patch size after the slash (upper and lower case differ)"
    )


def variant_name(shape: Shape) -> str | None:
    """The name of a shape ("ViT-S/8" included), or None for one outside the family."""
    for known, candidate in VARIANTS.items():
        if dataclasses.replace(candidate, patch_size=shape.patch_size) == shape:
            return f"{known.partition('/')[0]}/{shape.patch_size}"
    return None


def parameter_count(config: ViTConfig) -> int:
    """Exact number of parameters, pooling head and classifier included."""
    width, mlp, classes = config.width, config.mlp_dim, config.num_classes
    projections = 4 * width**2 + 4 * width  # q, k, v, out
    mlp_block = 2 * width * mlp + mlp + width
    embedding = 3 * config.patch_size**2 * width + width + config.num_patches * width
    trunk = embedding + config.depth * (projections + mlp_block + 4 * width) + 2 * width
    pool = {"map": projections + mlp_block + 3 * width, "gap": 0, "token": width}[
        config.pool
    ]  # probe and norm; [class]
    return trunk + pool + classes * (width + 1)


def flops_per_image(config: ViTConfig) -> float:
    """Floating-point operations of one image's forward pass: two per multiply-add of every matrix product.

    Trunk (N patches, T = N tokens, or N + 1 with a [class] token; D width, M mlp_dim, L depth, P patch_size):
        2 · [ 3P²·D·N  +  L·(4D²·T + 2·D·M·T + 2·T²·D) ]
    MAP head (its query does not depend on the image and is not counted):
        2 · [ 2D²·N + 2·N·D + D² + 2·D·M ]
    Classifier (C classes): 2·D·C.
    Element-wise work (norms, GELU, softmax; about 0.2 %) is left out. The trunk's figure is the paper's (Table 2).
    A training step costs three times this; recomputed activations are not model FLOPs.
    """
    width, mlp, patches = config.width, config.mlp_dim, config.num_patches
    tokens = patches + (config.pool == "token")
    block = 4 * width**2 * tokens + 2 * width * mlp * tokens + 2 * tokens**2 * width
    macs = 3 * config.patch_size**2 * width * patches + config.depth * block
    if config.pool == "map":
        macs += 2 * width**2 * patches + 2 * patches * width + width**2 + 2 * width * mlp
    return 2.0 * (macs + width * config.num_classes)
