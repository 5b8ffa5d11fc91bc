"""The forward pass against a float64 reference written from the equations, and the names that timm reads."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitds.errors import UserError
from vitds.models import ViTConfig, ViTForImageClassification
from vitds.models.layers import Linear

Array = np.ndarray
POOLS = ("map", "gap", "token")


def small(pool: str, **changes: object) -> ViTConfig:
    """Every number different, and an image of 5 patches and 3 pixels to cut off."""
    numbers = {"width": 24, "depth": 2, "mlp_dim": 40, "num_heads": 3, "patch_size": 7, "image_size": 38}
    return ViTConfig(**{**numbers, "pool": pool, "num_classes": 5, "init_head_bias": -2.5, **changes})


def scrambled(config: ViTConfig) -> ViTForImageClassification:
    """A model none of whose parameters is 0 or 1, so that each matters."""
    model = ViTForImageClassification(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def pictures(batch: int = 2, side: int = 38) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(2)) * 2 - 1


def norm(x: Array, p: dict[str, Array], at: str) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p[f"{at}.weight"] + p[f"{at}.bias"]


def mlp(x: Array, p: dict[str, Array], at: str) -> Array:
    h = x @ p[f"{at}.fc1.weight"].T + p[f"{at}.fc1.bias"]
    h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return h @ p[f"{at}.fc2.weight"].T + p[f"{at}.fc2.bias"]


def attend(q: Array, k: Array, v: Array, heads: int) -> Array:
    """One image: q (Q, D), k and v (N, D); head by head."""
    out = []
    for qh, kh, vh in zip(*(np.split(t, heads, axis=-1) for t in (q, k, v)), strict=True):
        scores = qh @ kh.T / math.sqrt(qh.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out.append(weights / weights.sum(-1, keepdims=True) @ vh)
    return np.concatenate(out, axis=-1)


def reference(image: Array, p: dict[str, Array], config: ViTConfig) -> Array:
    """Logits of one image (3, S, S)."""
    size, heads = config.patch_size, config.num_heads
    side = config.image_size // size
    x = np.stack(
        [
            (p["patch_embed.proj.weight"] * image[:, r * size : (r + 1) * size, c * size : (c + 1) * size]).sum(
                (1, 2, 3)
            )
            for r in range(side)
            for c in range(side)
        ]
    )
    x = x + p["patch_embed.proj.bias"] + p["pos_embed"][0]
    if config.pool == "token":
        x = np.concatenate([p["cls_token"][0], x])
    for i in range(config.depth):
        b = f"blocks.{i}"
        q, k, v = np.split(norm(x, p, f"{b}.norm1") @ p[f"{b}.attn.qkv.weight"].T + p[f"{b}.attn.qkv.bias"], 3, axis=-1)
        x = x + attend(q, k, v, heads) @ p[f"{b}.attn.proj.weight"].T + p[f"{b}.attn.proj.bias"]
        x = x + mlp(norm(x, p, f"{b}.norm2"), p, f"{b}.mlp")
    x = norm(x, p, "norm")
    if config.pool == "gap":
        pooled = x.mean(0)
    elif config.pool == "token":
        pooled = x[0]
    else:
        q = p["attn_pool.latent"][0] @ p["attn_pool.q.weight"].T + p["attn_pool.q.bias"]
        k, v = np.split(x @ p["attn_pool.kv.weight"].T + p["attn_pool.kv.bias"], 2, axis=-1)
        y = attend(q, k, v, heads) @ p["attn_pool.proj.weight"].T + p["attn_pool.proj.bias"]
        pooled = (y + mlp(norm(y, p, "attn_pool.norm"), p, "attn_pool.mlp"))[0]
    return p["head.weight"] @ pooled + p["head.bias"] + config.init_head_bias


@pytest.mark.parametrize("pool", POOLS)
def test_logits_are_the_equations(pool: str) -> None:
    config = small(pool)
    model, images = scrambled(config), pictures()
    parameters = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    expected = np.stack([reference(image, parameters, config) for image in images.double().numpy()])
    single = model(images).logits.detach()
    double = model.double()(images).logits.detach()
    np.testing.assert_allclose(double.numpy(), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(single.numpy(), expected, rtol=0, atol=2e-6)


def test_patches_are_the_convolution() -> None:
    model, images = scrambled(small("gap")).double(), pictures().double()
    projection = model.patch_embed.proj
    expected = F.conv2d(images, projection.weight, projection.bias, stride=7).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.patch_embed(images), expected, rtol=0, atol=1e-13)


def test_logits_are_fp32_arithmetic_on_16_bit_features() -> None:
    model = scrambled(small("map", init_head_bias=-10.0)).bfloat16()
    output, features = model(pictures()), model(pictures(), features_only=True).logits
    assert features.dtype == torch.bfloat16
    expected = features.float() @ model.head.weight.float().T + model.head.bias.float() - 10.0
    assert output.logits.dtype == torch.float32
    torch.testing.assert_close(output.logits, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert scrambled(small("map"))(pictures()).logits.dtype == torch.float32


def test_features_and_headless_models() -> None:
    model = scrambled(small("map"))
    features = model(pictures(), features_only=True).logits
    assert torch.equal(features, model.forward_head(model.forward_features(pictures()), pre_logits=True))
    bare = ViTForImageClassification(small("map", num_classes=0))
    bare.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("head")})
    assert torch.equal(bare(pictures()).logits, features)
    assert [name for name, _ in bare.decay_patterns()] == ["kernels", "rest"]
    with pytest.raises(UserError, match="labels"):
        bare(pictures(), labels=torch.tensor([0, 1]))


def test_wrong_images_are_refused() -> None:
    model = scrambled(small("gap"))
    with pytest.raises(UserError, match=r"expected \(B, 3, 38, 38\).*found \(2, 3, 40, 40\)"):
        model(pictures(side=40))
    with pytest.raises(UserError, match="floating point"):
        model(torch.zeros(1, 3, 38, 38, dtype=torch.uint8))


# Recorded from timm 1.0.31's parameters for the shape of `small`, built by the model card's call.
TRUNK = {"pos_embed": (1, 25, 24), "patch_embed.proj.weight": (24, 3, 7, 7), "patch_embed.proj.bias": (24,)}
for i in range(2):
    TRUNK |= {f"blocks.{i}.norm{n}.{p}": (24,) for n in (1, 2) for p in ("weight", "bias")}
    TRUNK |= {f"blocks.{i}.attn.qkv.weight": (72, 24), f"blocks.{i}.attn.qkv.bias": (72,)}
    TRUNK |= {f"blocks.{i}.attn.proj.weight": (24, 24), f"blocks.{i}.attn.proj.bias": (24,)}
    TRUNK |= {f"blocks.{i}.mlp.fc1.weight": (40, 24), f"blocks.{i}.mlp.fc1.bias": (40,)}
    TRUNK |= {f"blocks.{i}.mlp.fc2.weight": (24, 40), f"blocks.{i}.mlp.fc2.bias": (24,)}
TRUNK |= {"norm.weight": (24,), "norm.bias": (24,), "head.weight": (5, 24), "head.bias": (5,)}
MAP = {"attn_pool.latent": (1, 1, 24), "attn_pool.q.weight": (24, 24), "attn_pool.q.bias": (24,)}
MAP |= {"attn_pool.kv.weight": (48, 24), "attn_pool.kv.bias": (48,)}
MAP |= {"attn_pool.proj.weight": (24, 24), "attn_pool.proj.bias": (24,)}
MAP |= {"attn_pool.norm.weight": (24,), "attn_pool.norm.bias": (24,)}
MAP |= {"attn_pool.mlp.fc1.weight": (40, 24), "attn_pool.mlp.fc1.bias": (40,)}
MAP |= {"attn_pool.mlp.fc2.weight": (24, 40), "attn_pool.mlp.fc2.bias": (24,)}
TIMM = {"gap": TRUNK, "map": TRUNK | MAP, "token": TRUNK | {"cls_token": (1, 1, 24)}}


@pytest.mark.parametrize("pool", POOLS)
def test_names_and_shapes_are_timms(pool: str) -> None:
    model = ViTForImageClassification(small(pool))
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == TIMM[pool]
    assert model.shapes == TIMM[pool]
    assert set(model.state_dict()) == set(TIMM[pool])


def test_factored_views_set_heads_apart() -> None:
    model = ViTForImageClassification(small("map"))
    views = model.factored_views()
    assert views.keys() == model.shapes.keys()
    assert all(math.prod(views[name]) == math.prod(shape) for name, shape in model.shapes.items())
    assert {name: view for name, view in views.items() if view != model.shapes[name] and "blocks.1" not in name} == {
        "blocks.0.attn.qkv.weight": (3, 3, 8, 24),
        "blocks.0.attn.qkv.bias": (3, 3, 8),
        "blocks.0.attn.proj.weight": (24, 3, 8),
        "attn_pool.q.weight": (3, 8, 24),
        "attn_pool.q.bias": (3, 8),
        "attn_pool.kv.weight": (2, 3, 8, 24),
        "attn_pool.kv.bias": (2, 3, 8),
        "attn_pool.proj.weight": (24, 3, 8),
    }
    # Head 1 of k is what this view says it is.
    weight = model.blocks[0].attn.qkv.weight
    assert torch.equal(weight.view(3, 3, 8, 24)[1, 1], weight[24 + 8 : 24 + 16])


@pytest.mark.parametrize("pool", POOLS)
def test_decay_falls_on_kernels_alone(pool: str) -> None:
    import re

    model = ViTForImageClassification(small(pool))
    groups: dict[str, set[str]] = {}
    for name in model.shapes:
        group = next(group for group, pattern in model.decay_patterns() if re.fullmatch(pattern, name))
        groups.setdefault(group, set()).add(name)
    owners = dict(model.named_modules())
    kernels = {
        name
        for name in model.shapes
        if name.endswith(".weight")
        and (isinstance(owners[name.removesuffix(".weight")], Linear) or name.startswith("patch_embed"))
    }
    assert groups["head"] == {"head.weight"}
    assert groups["kernels"] == kernels - {"head.weight"}
    assert groups["rest"] == set(model.shapes) - kernels
