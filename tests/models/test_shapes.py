"""Shapes by name, exact parameter counts, FLOPs, and the run file's section."""

import pytest
import torch

from vitds.errors import UserError
from vitds.models import (
    VARIANTS,
    ModelSection,
    ViTConfig,
    ViTForImageClassification,
    build_config,
    flops_per_image,
    parameter_count,
    variant_shape,
)
from vitds.sections import parse, to_json

# Exact counts without a classifier: mean pooling, MAP head (measured on the authors' released code).
COUNTS = {
    "ViT-s/28": (5_357_824, None),
    "ViT-s/16": (4_986_112, None),
    "ViT-mu/16": (43_648, 56_320),
    "ViT-Ti/16": (5_524_032, 5_968_704),
    "ViT-S/32": (22_493_184, 24_267_264),
    "ViT-S/16": (21_664_896, 23_438_976),
    "ViT-M/16": (38_323_712, 41_475_584),
    "ViT-B/32": (87_453_696, 94_540_800),
    "ViT-B/16": (85_797_120, 92_884_224),
    "ViT-L/16": (303_299_584, 315_894_784),
    "ViT-So400m/14": (412_442_352, 427_680_704),
    "ViT-H/14": (630_762_240, 650_438_400),
    "ViT-g/14": (1_011_199_616, 1_036_448_384),
    "ViT-g-opt/16": (1_134_746_112, 1_163_076_096),
    "ViT-G/14": (1_842_772_352, 1_881_132_416),
    "ViT-G-opt/16": (1_663_486_464, 1_698_109_952),
    "ViT-e/14": (3_805_417_728, 3_873_342_720),
}


def on_meta(config: ViTConfig) -> ViTForImageClassification:
    with torch.device("meta"):
        return ViTForImageClassification(config)


def config_of(**section: object) -> ViTConfig:
    return build_config(parse(ModelSection, section, "vitds.model"))


@pytest.mark.parametrize("variant", COUNTS)
def test_exact_counts(variant: str) -> None:
    for pool, expected in zip(("gap", "map"), COUNTS[variant], strict=True):
        if expected is None:
            continue
        config = config_of(variant=variant, pool=pool, num_classes=0)
        assert sum(p.numel() for p in on_meta(config).parameters()) == expected
        assert parameter_count(config) == expected


def test_classifier_and_token_counts() -> None:
    assert parameter_count(config_of(num_classes=29593)) == 1_930_404_761
    config = config_of(variant="ViT-mu/16", pool="token", num_classes=3)
    assert parameter_count(config) == sum(p.numel() for p in on_meta(config).parameters()) == 43_648 + 32 + 33 * 3


@pytest.mark.parametrize(
    ("variant", "side", "gflops"),
    [  # Table 2 of the paper; it counts element-wise work too, about 0.2 % at G
        ("ViT-G/14", 224, 965.3),
        ("ViT-G/14", 384, 2859.9),
        ("ViT-g/14", 224, 533.1),
        ("ViT-L/16", 224, 122.9),
        ("ViT-S/32", 224, 2.3),
    ],
)
def test_flops_are_the_papers(variant: str, side: int, gflops: float) -> None:
    config = config_of(variant=variant, pool="gap", num_classes=0, image_size=side)
    assert flops_per_image(config) / 1e9 == pytest.approx(gflops, rel=0.01, abs=0.07)


def test_flops_count_pool_and_classifier() -> None:
    gap, pooled = (config_of(variant="ViT-S/16", pool=pool, num_classes=0) for pool in ("gap", "map"))
    width, mlp, patches = 384, 1536, 196
    head = 2 * (2 * width**2 * patches + 2 * width * patches + width**2 + 2 * width * mlp)
    assert flops_per_image(pooled) - flops_per_image(gap) == head
    assert flops_per_image(config_of(variant="ViT-S/16", num_classes=10)) - flops_per_image(pooled) == 2 * width * 10


def test_names() -> None:
    assert variant_shape("ViT-S/8").patch_size == 8
    assert variant_shape("ViT-s/16").width == 256
    assert variant_shape("ViT-S/16").width == 384
    assert all(config_of(variant=name).variant == name for name in VARIANTS)
    for wrong in ("ViT-XL/16", "ViT-S", "ViT-S/0", "ViT-S/x", "S/16"):
        with pytest.raises(UserError, match="allowed: ViT-mu/16"):
            variant_shape(wrong)
    with pytest.raises(UserError, match=r"vitds.model.variant.*did you mean 'ViT-B/16'"):
        config_of(variant="ViT-B16")


def test_numbers_override_and_replace() -> None:
    assert config_of(variant="ViT-S/16", depth=3, patch_size=4).shape == variant_shape("ViT-S/4").__class__(
        384, 3, 1536, 6, 4
    )
    assert config_of(width=32, depth=1, mlp_dim=128, num_heads=2, patch_size=16).variant == "ViT-mu/16"
    assert config_of(width=40, depth=1, mlp_dim=128, num_heads=5, patch_size=16).variant is None


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"variant": "ViT-S/16", "width": 400}, "width.*needs mlp_dim and num_heads"),
        ({"variant": "ViT-S/16", "num_heads": 7}, "vitds.model.num_heads: 7.*384.*allowed: 1, 2, 3, 4, 6"),
        ({"depth": 0}, "vitds.model.depth: 0"),
        ({"num_classes": -1}, "vitds.model.num_classes: -1"),
        ({"image_size": 13}, "vitds.model.image_size: 13.*14"),
        ({"pool": "mean"}, "vitds.model.pool: 'mean' is not known.*allowed: map, gap, token"),
        ({"loss": "sigmod"}, "did you mean 'sigmoid'"),
        ({"variant": None, "depth": 2}, "vitds.model.variant: missing"),
    ],
)
def test_impossible_sections(section: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config_of(**section)


def test_section_survives_json() -> None:
    section = ModelSection(variant="ViT-S/16", depth=3, init_head_bias=-10.0)
    assert parse(ModelSection, to_json(section), "vitds.model") == section
    assert build_config(ModelSection()).variant == "ViT-G/14"
