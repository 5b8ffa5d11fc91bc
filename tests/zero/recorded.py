"""A model whose gradients are whatever was recorded: loss = Σ ⟨parameter, gradient⟩.

Its parameters have the ragged shapes and per-head views of a ViT in small. Run as a script under `deepspeed` it steps
every optimizer in every cell of the matrix and writes the masters it ends with.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import save_file

from tests.zero.cells import ACCUMULATION, CELLS, STEPS, flat_elements
from vitds import dist
from vitds.optim import adafactor
from vitds.optim.groups import build_groups
from vitds.zero import TrainingEngine, init_distributed

D, HEADS, HEAD, MLP = 66, 2, 33, 71
SHAPES = {
    "qkv_weight": (3 * D, D), "qkv_bias": (3 * D,), "proj_weight": (D, D), "fc1_weight": (MLP, D), "fc1_bias": (MLP,),
    "fc2_weight": (D, MLP), "pos_embed": (1, 37, D), "patch_weight": (D, 3, 5, 5), "latent": (1, 1, D), "norm_weight": (D,),
    "head_weight": (45, D), "head_bias": (45,), "scalar": (1,),
}  # fmt: skip
VIEWS = {"qkv_weight": (3, HEADS, HEAD, D), "qkv_bias": (3, HEADS, HEAD), "proj_weight": (D, HEADS, HEAD)}
PATTERNS = [("head", "head_weight"), ("kernels", ".*_weight(?<!norm_weight)(?<!head_weight)"), ("rest", ".*")]
OPTIMIZERS = {
    "ModifiedAdafactor": {"lr": 1e-2, "weight_decay": 0.03, "head_weight_decay": 3.0},
    "HalfPrecisionMomentumAdam": {"lr": 1e-2, "weight_decay": 0.03, "head_weight_decay": 3.0},
    "HalfPrecisionMomentumSGD": {"lr": 1.0, "weight_decay": 0.03},
}


def initial(name: str) -> torch.Tensor:
    """The parameter's first value, fp32."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(SHAPES[name], generator=generator) * 0.02


def gradient(name: str, step: int, micro: int, rank: int, world: int) -> torch.Tensor:
    """One micro batch's gradient on one rank: exact in bf16, and so are its division by the ranks and every sum.

    Values are multiples of 2^-10 (over three ranks of 3·2^-10) up to 15 of them in size. DeepSpeed's ZeRO-2 divides
    bf16 gradients by the number of ranks before it adds them up, whatever `communication_data_type` says; with values
    that do not divide, that rounding alone is an error of 2e-2 here (docs/LOG.md, 2026-11-20).
    """
    generator = torch.Generator().manual_seed(sum(map(ord, name)) * 1009 + step * 31 + micro * 7 + rank)
    unit = 2.0**-10 * (3 if world == 3 else 1)
    return torch.randint(-15, 16, SHAPES[name], generator=generator).float() * unit


def factor(step: int) -> float:
    """The schedule: a first update with rate 0, as after a warmup start, then all different."""
    return 0.0 if step == 0 else 1 / (1 + 0.1 * step)


def tried(world: int) -> list[tuple[str, str]]:
    """(optimizer, cell) on a world size: Adafactor everywhere, the elementwise ones where the layout is special.

    `make torture` tries everything.
    """
    special = ("fp32 z1", "fp32 z2 round-robin", "fp32 z3 tiny sub-groups", "bf16 z1 fp32 sums", "bf16 z0")

    def wanted(optimizer: str, cell: str) -> bool:
        if optimizer == "ModifiedAdafactor" or os.environ.get("VITDS_TORTURE"):
            return True
        return world == 2 if optimizer == "HalfPrecisionMomentumAdam" else world == 2 and cell in special

    exact = [cell for cell in CELLS if not cell.startswith("masters")]  # bf16 masters are rounded in every step
    every = [(optimizer, cell) for cell in exact for optimizer in OPTIMIZERS if wanted(optimizer, cell)]
    return every + [
        ("HalfPrecisionMomentumAdam", cell) for cell in special if ("HalfPrecisionMomentumAdam", cell) not in every
    ]


def groups(optimizer: str):
    """The parameter groups of an optimizer's settings."""
    settings = OPTIMIZERS[optimizer]
    return build_groups(
        SHAPES, lr=settings["lr"], weight_decay=settings["weight_decay"], head_weight_decay=settings.get("head_weight_decay"),
        decay_patterns=PATTERNS, overrides=[],
    )  # fmt: skip


class Recorded(torch.nn.Module):
    """Holds the parameters; its loss has the recorded gradients."""

    shapes = SHAPES

    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, torch.nn.Parameter(torch.empty(shape, device="meta")))

    def factored_views(self) -> dict[str, tuple[int, ...]]:
        return VIEWS

    def forward(self, step: int, micro: int) -> torch.Tensor:
        terms = [
            (parameter.float() * gradient(name, step, micro, dist.rank(), dist.world_size()).to(parameter.device)).sum()
            for name, parameter in self.named_parameters()
        ]
        return torch.stack(terms).sum()


def run(optimizer: str, cell: str) -> dict[str, torch.Tensor]:
    """Step one optimizer in one cell; this rank's fragments of the masters, keyed `name|start`."""
    section = {**CELLS[cell], "train_micro_batch_size_per_gpu": 1, "train_batch_size": ACCUMULATION * dist.world_size()}
    choice = {"type": optimizer, "params": {}}
    engine = TrainingEngine(Recorded(), groups(optimizer), choice, section, ACCUMULATION, flat_elements(cell))
    for shard in engine.master_shards():
        shard.data.copy_(initial(shard.name).view(-1)[shard.start : shard.start + shard.data.numel()])
    engine.refresh_weights()
    assert engine.counters()["optimizer"]["updates"] == 0, "the count starts before the first update"
    for step in range(STEPS):
        engine.set_learning_rate(factor(step))
        for micro in range(ACCUMULATION):
            engine.backward(engine(step, micro))
            updated = engine.step()
        assert updated, f"step {step} was skipped"
    assert engine.counters()["optimizer"]["updates"] == STEPS
    out = {f"{shard.name}|{shard.start}": shard.data.detach().clone().cpu() for shard in engine.master_shards()}
    out["wrapper|" + engine.wrapper_name] = torch.zeros(1)
    out["norm|0"] = torch.tensor([engine.gradient_norm])
    out["state|" + str(engine.optimizer.state_bytes())] = torch.zeros(1)
    engine.close()
    return out


def main(directory: str) -> None:
    get_accelerator().is_fp16_supported = lambda: True  # slow on CPUs, and so refused, but right
    get_accelerator().supported_dtypes = lambda: [torch.float32, torch.bfloat16, torch.float16]
    init_distributed()
    results: dict[str, torch.Tensor] = {}
    for optimizer, cell in tried(dist.world_size()):
        for key, value in run(optimizer, cell).items():
            results[f"{optimizer}|{cell}|{key}"] = value
    # The negative control: without the sum over ranks the run looks just as healthy, and must be caught.
    adafactor.sum_over_ranks = lambda tensor, group=None: tensor
    for cell in ("fp32 z1", "fp32 z2", "fp32 z3"):
        for key, value in run("ModifiedAdafactor", cell).items():
            results[f"broken|{cell}|{key}"] = value
    save_file(results, str(Path(directory) / f"rank{dist.rank()}.safetensors"))
    dist.leave(0)


if __name__ == "__main__":
    main(next(word for word in sys.argv[1:] if not word.startswith("--")))
