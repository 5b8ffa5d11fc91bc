"""A small ViT trained on the digits in every cell of the matrix; run as a script under `deepspeed`.

Each cell is trained without a break, saving half way; then a new engine goes on from that checkpoint.
Written per rank: losses, final masters, and whether the two runs ended with the same bits.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.zero.cells import ACCUMULATION, CELLS
from vitds import dist
from vitds.checkpoint import CheckpointSection
from vitds.checkpoint.state import RunState
from vitds.data import DataSection, SourceSection, TrainLoader, build_sources, to_model_range
from vitds.models import ModelSection, VitdsImageProcessor, ViTForImageClassification, build_config
from vitds.optim.groups import build_groups
from vitds.schedules import build_schedule
from vitds.zero.engine import TrainingEngine, init_distributed
from vitds.zero.observe import observed

STEPS, BATCH = 10, 12
MODEL = ModelSection(
    width=64,
    depth=2,
    mlp_dim=96,
    num_heads=2,
    patch_size=2,
    image_size=8,
    num_classes=10,
    loss="sigmoid",
    init_head_bias=-2.0,
)
DATA = DataSection(train=SourceSection("digits", transforms=[{"random_shift": {"pixels": 1}}]))
ADAFACTOR = {"type": "ModifiedAdafactor", "params": {"lr": 5e-3, "weight_decay": 0.03, "head_weight_decay": 3.0}}
ADAM = {"type": "HalfPrecisionMomentumAdam", "params": {"lr": 3e-3, "weight_decay": 0.03}}

# name -> (cell, optimizer, activation checkpointing, world sizes)
Run = tuple[str, dict[str, Any], str, tuple[int, ...]]
STAGES = ("fp32 z0", "fp32 z1", "fp32 z2", "fp32 z3")
ELSEWHERE = ("fp32 z1", "fp32 z2", "fp32 z3", "bf16 z2")
TORCH_ADAM = {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}}
POLICIES = (("z2", "full"), ("z2", "every:2"), ("z2", "selective"), ("z3", "full"), ("z3", "selective"))
RUNS: dict[str, Run] = {
    "fp32 z0 adafactor": ("fp32 z0", ADAFACTOR, "none", (1, 2)),
    "fp32 z0 adam": ("fp32 z0", ADAM, "none", (1, 2)),
    **{f"{cell} adafactor": (cell, ADAFACTOR, "none", (1, 2, 3)) for cell in ELSEWHERE},
    **{
        f"{cell} adafactor": (cell, ADAFACTOR, "none", (2,))
        for cell in CELLS
        if cell.split()[0] != "fp32" and cell != "bf16 z2"
    },
    **{f"{cell} adam": (cell, ADAM, "none", (2,)) for cell in STAGES[1:]},
    **{f"fp32 {stage} {policy}": (f"fp32 {stage}", ADAFACTOR, policy, (2,)) for stage, policy in POLICIES},
    "fp32 z2 torch RMSprop": ("fp32 z2", {"type": "RMSprop", "params": {"lr": 1e-4}}, "none", (2,)),
    "bf16 z0 DeepSpeed Adam": ("bf16 z0", TORCH_ADAM, "none", (2,)),
    "bf16 z3 DeepSpeed Adam": ("bf16 z3", TORCH_ADAM, "none", (2,)),
}


class Trainer:
    """One engine with its state and stream."""

    def __init__(self, cell: str, optimizer: dict[str, Any], policy: str, directory: Path) -> None:
        config = build_config(MODEL)
        with torch.device("meta"):
            self.model = ViTForImageClassification(config)
        self.model.set_activation_checkpointing(policy)
        params = optimizer["params"]
        groups = build_groups(
            self.model.shapes, lr=params["lr"], weight_decay=params.get("weight_decay", 0.0),
            head_weight_decay=params.get("head_weight_decay"), decay_patterns=self.model.decay_patterns(),
        )  # fmt: skip
        world = dist.world_size()
        micro = BATCH // world // ACCUMULATION
        section = {**CELLS[cell], "train_batch_size": BATCH, "train_micro_batch_size_per_gpu": micro}
        self.engine = TrainingEngine(self.model, groups, optimizer, section, ACCUMULATION)
        schedule = {"type": "rsqrt", "params": {"warmup_steps": 3, "timescale_steps": 5, "cooldown_steps": 4}}
        self.schedule = build_schedule(schedule, total_steps=STEPS, global_batch=BATCH)
        resolved = {
            "vitds": {"train": {"seed": 0}},
            "optimizer": optimizer,
            "zero_optimization": section["zero_optimization"],
        }
        self.state = RunState(self.engine, self.model, self.schedule, resolved, VitdsImageProcessor(8, 8))
        self.directory = directory
        self.progress, _ = self.state.restore(directory, CheckpointSection(), None)
        source, _ = build_sources(DATA, 10)
        self.loader = TrainLoader(
            source, DATA, image_size=8, num_classes=10, seed=0, global_batch=BATCH, micro_batch=micro, rank=dist.rank(),
            world_size=world, position=self.progress.position,
        )  # fmt: skip

    def train(self, until: int) -> list[float]:
        """Steps up to `until`; the mean loss of each."""
        losses = []
        while self.progress.step < until:
            self.engine.set_learning_rate(self.schedule(self.progress.step))
            micro_losses = []
            for _ in range(ACCUMULATION):
                batch = next(self.loader)
                images, labels = to_model_range(batch.images, self.engine.device), batch.labels.to(self.engine.device)
                loss = self.engine(images, labels=labels).loss
                self.engine.backward(loss)
                micro_losses.append(loss.detach())
                updated = self.engine.step()
            assert updated
            losses.append(dist.mean(torch.stack(micro_losses)))
            self.progress.step += 1
            self.progress.position += BATCH
            self.progress.images_seen += BATCH
        return losses

    def held(self) -> dict[str, torch.Tensor]:
        """Copies of this rank's masters and optimizer state."""
        shards = [*self.engine.master_shards(), *self.engine.state_shards()]
        return {f"{shard.name}|{shard.start}": shard.data.detach().cpu().clone() for shard in shards}


def run(name: str, scratch: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    cell, optimizer, policy, _ = RUNS[name]
    checkpoints = scratch / "checkpoints"
    unbroken = Trainer(cell, optimizer, policy, checkpoints)
    for shard in unbroken.engine.master_shards():
        initial = unbroken.model.initial_tensor(shard.name, 0).view(-1)[shard.start : shard.start + shard.data.numel()]
        assert torch.equal(shard.data.detach(), initial), (
            f"{name}: step-0 master {shard.name} is not the fp32 initial value"
        )
    losses = unbroken.train(STEPS // 2)
    unbroken.state.save(checkpoints, unbroken.progress, CheckpointSection())
    losses += unbroken.train(STEPS - 1)
    before = unbroken.held()
    with observed(unbroken.engine) as norms:
        losses += unbroken.train(STEPS)
    final = unbroken.held()
    facts: dict[str, Any] = {
        "optimizer": optimizer["type"],
        "losses": losses,
        "grad_norm": unbroken.engine.gradient_norm,
        "wrapper": unbroken.engine.wrapper_name,
    }
    facts["observed_grad_norm"] = sum(n.gradient for n in norms.values()) ** 0.5
    facts["observed_weight"] = {n: v.weight for n, v in norms.items()}
    facts["observed_update"] = {n: v.update for n, v in norms.items()}
    moved = {k: final[k] - before[k] for k in final if k.split("|")[0] in norms}
    facts["own_update"] = {k: float(v.double().square().sum()) for k, v in moved.items()}
    unbroken.engine.close()

    second = Trainer(cell, optimizer, policy, checkpoints)
    assert second.progress.step == STEPS // 2
    facts["resumed_losses"] = second.train(STEPS)
    again = second.held()
    facts["differing"] = [key for key in final if not torch.equal(final[key], again[key])]
    second.engine.close()
    return facts, {key: value for key, value in final.items() if key.split("|")[0] in norms}


def main(directory: Path) -> None:
    init_distributed()
    facts, tensors = {}, {}
    for name, (cell, _, _, world_sizes) in RUNS.items():
        elsewhere = dist.world_size() not in world_sizes and not os.environ.get("VITDS_TORTURE")
        if elsewhere or (cell.startswith("fp16") and not torch.cuda.is_available()):
            continue
        scratch = Path(dist.broadcast_object(tempfile.mkdtemp(dir=directory) if dist.is_main() else None))
        facts[name], held = run(name, scratch)
        tensors |= {f"{name}|{key}": value for key, value in held.items()}
    (directory / f"rank{dist.rank()}.json").write_text(json.dumps(facts))
    save_file(tensors, str(directory / f"rank{dist.rank()}.safetensors"))
    dist.leave(0)


if __name__ == "__main__":
    main(Path(next(word for word in sys.argv[1:] if not word.startswith("--"))))
