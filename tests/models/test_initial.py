"""How every tensor starts: after building, from `initial_tensor`, and after transformers loads part of a model."""

import copy
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vitds.models import ViTConfig, ViTForImageClassification, build_config
from vitds.models.config import ModelSection

WIDTH, MLP, PATCH = 192, 700, 14


def config(**changes: object) -> ViTConfig:
    numbers = {"width": WIDTH, "depth": 1, "mlp_dim": MLP, "num_heads": 3, "patch_size": PATCH, "pool": "map"}
    return ViTConfig(**{**numbers, "num_classes": 50, "init_head_bias": -10.0, **changes})


def rule(name: str) -> tuple[float, float, float]:
    """(mean, standard deviation, largest magnitude) that a parameter should have; written from the paper's code."""
    if name == "patch_embed.proj.weight":
        std = math.sqrt(1 / (3 * PATCH**2))
        return 0, std, 2 * std / 0.87962566
    if name == "pos_embed":
        return 0, 1 / math.sqrt(WIDTH), math.inf
    fans = {"attn.": WIDTH + WIDTH, "mlp.": WIDTH + MLP, "attn_pool.q": 2 * WIDTH, "attn_pool.kv": 2 * WIDTH}
    fans |= {"attn_pool.proj": 2 * WIDTH, "attn_pool.latent": 1 + WIDTH}
    if name.endswith(("fc1.bias", "fc2.bias")):
        return 0, 1e-6, math.inf
    if "norm" in name:
        return (1, 0, 1) if name.endswith("weight") else (0, 0, 0)
    if name.endswith("bias") or name in ("head.weight", "cls_token"):
        return 0, 0, 0
    bound = math.sqrt(6 / next(fan for part, fan in fans.items() if part in name))
    return 0, bound / math.sqrt(3), bound


def check(name: str, tensor: torch.Tensor) -> None:
    mean, std, largest = rule(name)
    values, n = tensor.detach().double().flatten(), tensor.numel()
    if std == 0:
        assert torch.equal(values, torch.full_like(values, mean)), name
        return
    assert abs(values.mean() - mean) < 5 * std / math.sqrt(n), name
    assert abs(values.std() / std - 1) < 5 / math.sqrt(n), (name, float(values.std()), std)
    assert values.abs().max() <= largest * (1 + 1e-6), name
    if largest < math.inf:
        assert values.abs().max() > largest * (1 - 20 / n - 1e-3), (name, "the bound is not reached")
    else:
        assert values.abs().max() > 2 * std * (n > 1000), (name, "truncated")


@pytest.mark.parametrize("pool", ["map", "token"])
def test_every_tensor_after_building(pool: str) -> None:
    torch.manual_seed(0)
    model = ViTForImageClassification(config(pool=pool))
    for name, parameter in model.named_parameters():
        check(name, parameter)
    # q, k and v are each filled by their own fans, and are not copies of each other.
    parts = model.blocks[0].attn.qkv.weight.split(WIDTH)
    for part in parts:
        check("attn.qkv.weight", part)
    assert not torch.equal(parts[0], parts[1])


def test_initial_tensors_follow_the_same_rules() -> None:
    model = ViTForImageClassification(config())
    for name, shape in model.shapes.items():
        tensor = model.initial_tensor(name, 3)
        assert tensor.shape == shape
        assert tensor.dtype == torch.float32
        check(name, tensor)


def test_initial_tensor_is_a_pure_function_of_seed_and_name() -> None:
    live = ViTForImageClassification(config())
    with torch.device("meta"):
        meta = ViTForImageClassification(config())
    half = copy.deepcopy(live).bfloat16()
    emptied = copy.deepcopy(half)
    for parameter in emptied.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    before = torch.random.get_rng_state()
    for name in live.shapes:
        expected = live.initial_tensor(name, 5)
        assert torch.equal(expected, live.initial_tensor(name, 5))
        for other in (meta, half, emptied):
            assert torch.equal(expected, other.initial_tensor(name, 5)), name
            assert other.initial_tensor(name, 5).device.type == "cpu"
    assert torch.equal(before, torch.random.get_rng_state())
    fc1 = "blocks.0.mlp.fc1.weight"
    assert not torch.equal(live.initial_tensor(fc1, 5), live.initial_tensor(fc1, 6))
    q, proj = (live.initial_tensor(f"attn_pool.{part}.weight", 5) for part in ("q", "proj"))
    assert not torch.equal(q, proj)
    for module in emptied.modules():  # nothing to fill, and nothing that raises
        emptied._init_weights(module)


def test_numbers_of_vit_giant() -> None:
    """Measured on the authors' released code for ViT-G/14."""
    with torch.device("meta"):
        model = ViTForImageClassification(build_config(ModelSection(num_classes=0)))
    for name, std, largest in [
        ("patch_embed.proj.weight", 0.04124, 0.09377),
        ("pos_embed", 0.02451, None),
        ("attn_pool.latent", 0.0347, 0.06003),
        ("blocks.7.attn.proj.weight", 0.042460 / math.sqrt(3), 0.042460),
        ("blocks.47.mlp.fc1.weight", 0.024673 / math.sqrt(3), 0.024673),
    ]:
        tensor = model.initial_tensor(name, 0)
        assert float(tensor.std()) == pytest.approx(std, rel=0.02)
        assert largest is None or float(tensor.abs().max()) == pytest.approx(largest, rel=2e-3)


def test_16_bit_models_start_as_rounded_draws() -> None:
    torch.manual_seed(0)
    single = ViTForImageClassification(config())
    torch.manual_seed(0)
    half = ViTForImageClassification._from_config(config(), dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    for (name, a), b in zip(single.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b), name


def saved(model: ViTForImageClassification, directory: Path) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(directory)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_another_class_count_starts_only_the_head_anew(tmp_path: Path) -> None:
    weights = saved(ViTForImageClassification(config()), tmp_path)
    model = ViTForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert model.config.num_classes == 7
    for name, parameter in model.named_parameters():
        if name.startswith("head."):
            assert parameter.shape[0] == 7
            check(name, parameter)
        else:
            assert torch.equal(parameter, weights[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_missing_tensors_start_anew_and_their_neighbours_stay(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = saved(ViTForImageClassification(config()), tmp_path)
    missing = {"blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.bias", "pos_embed", "norm.weight", "attn_pool.latent"}
    kept = {name: t for name, t in load_file(tmp_path / "model.safetensors").items() if name not in missing}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = ViTForImageClassification.from_pretrained(tmp_path, dtype=dtype)
    for name, parameter in model.named_parameters():
        if name not in missing:
            assert torch.equal(parameter, weights[name].to(dtype)), name
        elif dtype == torch.float32:
            check(name, parameter)
        else:
            assert float(parameter.detach().float().std()) == pytest.approx(rule(name)[1], rel=0.2), name


def test_a_loaded_head_can_be_reset() -> None:
    model = ViTForImageClassification(config())
    model.head.weight.data.normal_()
    model.head.weight._is_hf_initialized = True
    model.head.reset_parameters()
    check("head.weight", model.head.weight)
