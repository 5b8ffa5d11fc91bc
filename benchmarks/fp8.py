"""An experiment: the blocks' linear layers in 8-bit floats, and what that does to learning, beside bf16 and fp32.

    python benchmarks/fp8.py [--steps 800 --seeds 0 1 --json benchmarks/fp8.json]

The rule is torchao's dynamic per-tensor scaling: before each product both factors are scaled so that their largest
element is the format's largest number and rounded, x and W to e4m3, gradients of outputs to e5m2; sums are fp32. On a
CUDA device with torchao the products themselves are 8-bit ones (`convert_to_float8_training`); elsewhere they are made
in fp32 of the rounded factors, which is the same arithmetic and not its speed. A figure to compare with: the same
layers rounded to bf16. Weights are fp32 and the optimizer is AdamW throughout, so that precision alone differs.
Nothing of vitds uses any of this.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitds.data import DataSection, SourceSection, TrainLoader, build_sources, to_model_range
from vitds.models import ModelSection, ViTForImageClassification, build_config
from vitds.models.layers import Linear

sys.path.insert(0, str(Path(__file__).parent))
from runner import header

MODEL = ModelSection(
    width=64, depth=4, mlp_dim=128, num_heads=2, patch_size=2, num_classes=10, image_size=8, init_head_bias=-2.0
)
DATA = DataSection(
    train=SourceSection("digits", transforms=[{"random_shift": {"pixels": 1}}]), eval=SourceSection("digits")
)
BATCH, RATE, WARMUP = 96, 4e-3, 100
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def to_fp8(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x rounded to 8 bits with one scale for the whole tensor, in fp32."""
    scale = torch.finfo(dtype).max / x.abs().amax().float().clamp(min=1e-12)
    return (x.float() * scale).to(dtype).float() / scale


def to_bf16(x: torch.Tensor, _: torch.dtype) -> torch.Tensor:
    """x rounded to bf16, in fp32."""
    return x.bfloat16().float()


class RoundedLinear(torch.autograd.Function):
    """x Wᵀ + b in fp32 of rounded factors, forward and backward."""

    @staticmethod
    def forward(
        context: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, rounded: Callable[..., Any]
    ) -> Any:
        x, weight = rounded(x, E4M3), rounded(weight, E4M3)
        context.save_for_backward(x, weight)
        context.rounded = rounded
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        x, weight = context.saved_tensors
        coarse = context.rounded(gradient, E5M2)
        return coarse @ weight, coarse.flatten(0, -2).T @ x.flatten(0, -2), gradient.flatten(0, -2).sum(0), None


def emulate(model: ViTForImageClassification, rounded: Callable[..., Any]) -> None:
    """Let every linear layer of the blocks round its factors."""
    for layer in model.blocks.modules():
        if isinstance(layer, Linear):
            layer.forward = lambda x, own=layer: RoundedLinear.apply(x, own.weight, own.bias, rounded)


def in_torchao(model: ViTForImageClassification) -> None:
    """The blocks' layers as torch's own, which torchao then replaces by its 8-bit ones."""
    from torchao.float8 import convert_to_float8_training

    for parent in list(model.blocks.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Linear):
                plain = nn.Linear(layer.weight.shape[1], layer.weight.shape[0], device="meta")
                plain.weight, plain.bias = nn.Parameter(layer.weight), nn.Parameter(layer.bias)
                setattr(parent, name, plain)
    convert_to_float8_training(model.blocks)


def train(prepare: Callable[[ViTForImageClassification], None], seed: int, steps: int, device: str) -> dict[str, Any]:
    """The loss every 20 steps (mean of these), and the share of held-out digits that are right in the end."""
    model = ViTForImageClassification(build_config(MODEL))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(model.initial_tensor(name, seed))
    model.to(device)
    prepare(model)
    source, held_out, _ = build_sources(DATA, 10)
    shared = {"image_size": 8, "num_classes": 10, "rank": 0, "world_size": 1}
    loader = TrainLoader(source, DATA, seed=seed, global_batch=BATCH, micro_batch=BATCH, **shared)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.03)
    losses: list[float] = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / steps)))
        batch = next(loader)
        loss = model(to_model_range(batch.images, device), labels=batch.labels.to(device)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    loader.close()
    with torch.no_grad():
        grey, labels, _ = zip(*held_out.read_many(range(len(held_out))), strict=True)
        images = torch.tensor(np.stack(grey))[:, None].expand(-1, 3, -1, -1)
        right = model(to_model_range(images, device)).logits.argmax(1).cpu() == torch.tensor(labels)
    curve = [sum(losses[i : i + 20]) / len(losses[i : i + 20]) for i in range(0, steps, 20)]
    return {"curve": curve, "top1": float(right.float().mean())}


def candidates(device: str) -> dict[str, Callable[[ViTForImageClassification], None]]:
    """By name, what is done to a model; torchao's 8-bit products where they can be had."""
    found: dict[str, Callable[[ViTForImageClassification], None]] = {
        "fp32": lambda model: None,
        "bf16, emulated": lambda model: emulate(model, to_bf16),
        "fp8, emulated": lambda model: emulate(model, to_fp8),
    }
    try:
        import torchao  # noqa: F401
    except ImportError:
        return found
    return {**found, "fp8, torchao": in_torchao} if device == "cuda" else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs: dict[str, dict[str, Any]] = {}
    shown = sorted({i * (options.steps // 20 - 1) // 4 for i in range(5)})
    print(
        f"digits, {options.steps} steps of {BATCH}, {device}; loss, mean of 20 steps up to step …, and top-1 in the end"
    )
    print(f"{'':24}" + "".join(f"{20 * (i + 1):>9}" for i in shown) + f"{'top-1':>9}")
    for name, change in candidates(device).items():
        for seed in options.seeds:
            run = runs[f"{name}, seed {seed}"] = train(change, seed, options.steps, device)
            print(
                f"{name + f', seed {seed}':24}"
                + "".join(f"{run['curve'][i]:9.4f}" for i in shown)
                + f"{run['top1']:9.1%}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({**header(device), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
