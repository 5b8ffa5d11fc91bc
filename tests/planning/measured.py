"""Trains small models for real on the CPU and writes down the most bytes that tensors took, beside what was forecast.

Run as a script on some ranks (tests.launching.ranks); rank 0 writes the list of cells.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.live_memory import live_memory
from tests.zero import cells
from vitds import dist
from vitds.data import to_model_range
from vitds.models import ModelSection, ViTConfig, ViTForImageClassification, build_config
from vitds.optim.groups import build_groups
from vitds.planning.memory import memory
from vitds.planning.workload import workload_of_shape
from vitds.zero import TrainingEngine, init_distributed

WIDE: dict[str, Any] = {
    "width": 256,
    "depth": 4,
    "mlp_dim": 1024,
    "num_heads": 4,
    "patch_size": 8,
    "image_size": 32,
    "num_classes": 50,
}
"""Mostly weights: 4 million of them, and few activations."""
LONG: dict[str, Any] = {
    "width": 96,
    "depth": 6,
    "mlp_dim": 384,
    "num_heads": 3,
    "patch_size": 4,
    "image_size": 64,
    "num_classes": 300,
}
"""Mostly activations: 256 tokens an image."""
ADAFACTOR = {"type": "ModifiedAdafactor", "params": {"lr": 5e-3, "weight_decay": 0.03, "head_weight_decay": 3.0}}
ADAM = {"type": "HalfPrecisionMomentumAdam", "params": {"lr": 3e-3, "weight_decay": 0.03}}
SGD = {"type": "HalfPrecisionMomentumSGD", "params": {"lr": 3e-3}}
TORCH = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
BELOW, TRUNK = r"patch_embed\..*|pos_embed|blocks\.[012]\..*", r"(?!head\.).*"
"""What is frozen."""
FLAT = 2**20
STEPS = 2


@dataclass(frozen=True)
class Run:
    """One cell: DeepSpeed's section by name, and the rest."""

    section: str
    accumulation: int = 2
    micro_batch: int = 2
    model: dict[str, Any] = field(default_factory=lambda: WIDE)
    optimizer: dict[str, Any] = field(default_factory=lambda: ADAFACTOR)
    policy: str = "none"
    bucket: int = 300_000
    zero: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    frozen: str = ""
    """Pattern of the parameters that are not trained."""
    ranks: tuple[int, ...] = (1, 2)
    quick: bool = False

    @property
    def overrides(self) -> list[Any]:
        """`vitds.groups` of a run file."""
        return [[self.frozen, {"frozen": True}]] if self.frozen else []

    @property
    def deepspeed(self) -> dict[str, Any]:
        """The section itself."""
        base = cells.CELLS[self.section]
        zero = {**base["zero_optimization"], "reduce_bucket_size": self.bucket, **self.zero}
        return {**base, "zero_optimization": zero, **self.more}


WEIGHTS = ("fp32 z0", "fp32 z1", "fp32 z2", "fp32 z3", "bf16 z0", "bf16 z1", "bf16 z1 fp32 sums", "bf16 z2", "bf16 z3")
BF16_SENT = {"communication_data_type": "bf16"}
BF16_SUMS = {"data_types": {"grad_accum_dtype": "bf16"}}
RUNS: dict[str, Run] = {
    **{f"{name}, {count} micro": Run(name, count, quick=count == 2) for name in WEIGHTS for count in (1, 2)},
    **{f"{name} {kind['type']}": Run(name, 1, optimizer=kind)
       for name in ("fp32 z1", "bf16 z2", "bf16 z3") for kind in (ADAM, SGD, TORCH)},
    "bf16 z2 sent in bf16": Run("bf16 z2", more=BF16_SENT),
    "bf16 z2 bf16 sums": Run("bf16 z2", more={**BF16_SENT, **BF16_SUMS}),
    "bf16 z2 bf16 sums, 1 micro": Run("bf16 z2", 1, more={**BF16_SENT, **BF16_SUMS}),
    "bf16 z3 bf16 sums": Run("bf16 z3", more={**BF16_SENT, **BF16_SUMS}),
    "bf16 z2 overlapping": Run("bf16 z2", zero={"overlap_comm": True}),
    "bf16 z1 overlapping": Run("bf16 z1", zero={"overlap_comm": True}),
    "bf16 z2 large bucket": Run("bf16 z2", bucket=3_000_000),
    "bf16 z2 small bucket": Run("bf16 z2", bucket=50_000),
    "bf16 z3 tight": Run("bf16 z3", zero={"stage3_prefetch_bucket_size": 300_000, "stage3_max_live_parameters": 900_000,
                                          "stage3_max_reuse_distance": 100_000}),
    "bf16 z3 persistent": Run("bf16 z3", zero={"stage3_param_persistence_threshold": 10_000, "sub_group_size": 500_000}),
    **{f"long {name} {policy}": Run(name, 1, 4, LONG, policy=policy, quick=name == "bf16 z2", ranks=(1,))
       for name in ("fp32 z2", "bf16 z2", "bf16 z3") for policy in ("none", "full", "every:2", "selective")},
    "long softmax": Run("bf16 z2", 2, 4, {**LONG, "loss": "softmax", "pool": "gap"}, ranks=(1,)),
    "long token": Run("fp32 z1", 2, 4, {**LONG, "pool": "token"}, ranks=(1,)),
    **{f"{name} frozen below": Run(name, count, optimizer=SGD, frozen=BELOW, quick=name == "bf16 z2" and count == 2)
       for name in ("fp32 z0", "fp32 z1", "bf16 z0", "bf16 z1", "bf16 z1 fp32 sums", "bf16 z2", "bf16 z3") for count in (1, 2)},
    **{f"long {name} frozen below, {policy}": Run(name, 1, 4, LONG, policy=policy, frozen=BELOW, ranks=(1,), quick=policy == "selective")
       for name, policies in (("fp32 z2", ("none", "full", "every:2", "selective")), ("bf16 z2", ("none", "every:2", "selective")))
       for policy in policies},
    **{f"{size} frozen trunk": Run("bf16 z2", 2, 4, model, optimizer=SGD, frozen=TRUNK) for size, model in (("wide", WIDE), ("long", LONG))},
    "long wide classifier": Run("bf16 z2", 1, 16, {**LONG, "num_classes": 8000}, ranks=(1,)),
}  # fmt: skip


def chosen(ranks: int) -> dict[str, Run]:
    """The cells for a number of ranks; all of them under VITDS_TORTURE."""
    everything = bool(os.environ.get("VITDS_TORTURE"))
    return {name: run for name, run in RUNS.items() if ranks in run.ranks and (everything or run.quick)}


def measure(run: Run) -> dict[str, Any]:
    """Forecast and measurement in bytes: the peak of all, and by part of the step."""
    ranks = dist.world_size()
    config = build_config(ModelSection(**run.model))
    workload = workload_of_shape(
        config, run.optimizer, run.deepspeed, micro_batch=run.micro_batch, accumulation=run.accumulation,
        policy=run.policy, device="cpu", flat_elements=FLAT, overrides=run.overrides,
    )  # fmt: skip
    forecast = memory(workload, ranks)
    size = config.image_size
    with live_memory() as seen:
        engine = build(run, config, workload.job.section)
        engine.set_learning_rate(1.0)
        images = None
        for step in range(STEPS):
            if step == STEPS - 1:  # from the second step on all there is to be is there
                seen.peak, seen.peaks = seen.now, {}
            for _ in range(run.accumulation):
                seen.part("passes")
                pixels = torch.randint(0, 255, (run.micro_batch, 3, size, size), dtype=torch.uint8)
                images = to_model_range(pixels, engine.device)
                loss = engine(images, labels=torch.zeros(run.micro_batch, dtype=torch.long)).loss
                engine.backward(loss)
                loss = loss.detach()
                seen.part("step")
                engine.step()
        seen.part("evaluation")
        engine.train(False)
        with torch.no_grad():
            logits = engine(images).logits
        del logits
        found = {"peak": seen.peak, **seen.peaks}
        where = [f"{size / 2**20:8.2f} MiB {count:5} {place}" for size, count, place in seen.where(2**18)]
    engine.close()
    moments = forecast.moments
    passes = max(moments[name] for name in ("loss", "backward", "reduction"))
    told = {"peak": forecast.peak, "passes": passes, "step": moments["step"], "evaluation": moments["evaluation"]}
    return {"measured": found, "forecast": told, "moments": moments, "where": where}


def build(run: Run, config: ViTConfig, section: Mapping[str, Any]) -> TrainingEngine:
    """The engine of a cell; its weights are noise."""
    with torch.device("meta"):
        vit = ViTForImageClassification(config)
    vit.set_activation_checkpointing(run.policy)
    rates = {key: run.optimizer["params"].get(key) for key in ("lr", "weight_decay", "head_weight_decay")}
    rates["weight_decay"] = rates["weight_decay"] or 0.0
    groups = build_groups(vit.shapes, **rates, decay_patterns=vit.decay_patterns(), overrides=run.overrides)
    batch = {"train_batch_size": run.micro_batch * run.accumulation * dist.world_size()}
    batch["train_micro_batch_size_per_gpu"] = run.micro_batch
    return TrainingEngine(vit, groups, run.optimizer, {**section, **batch}, run.accumulation, FLAT)


def main(directory: Path, *names: str) -> None:
    init_distributed()
    runs = {name: RUNS[name] for name in names} or chosen(dist.world_size())
    # What DeepSpeed puts in torch's place for ZeRO-3 stays there.
    runs = dict(sorted(runs.items(), key=lambda item: "z3" in item[1].section))
    found = {name: measure(run) for name, run in runs.items()}
    if dist.is_main():
        (directory / "measured.json").write_text(json.dumps(found))
    dist.leave(0)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    main(Path(words[0]), *words[1:])
