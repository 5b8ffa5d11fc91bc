"""What the scripts that train under every stage share: a small ViT on the digits, its engine in a cell, and one step."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.zero.cells import ACCUMULATION, CELLS, flat_elements
from vitds import dist
from vitds.data import Batch, DataSection, SourceSection, to_model_range
from vitds.models import ModelSection, ViTForImageClassification, build_config
from vitds.optim.groups import build_groups
from vitds.zero.engine import TrainingEngine

MODEL = ModelSection(
    width=64, depth=2, mlp_dim=96, num_heads=2, patch_size=2, image_size=8, num_classes=10, loss="sigmoid"
)
DATA = DataSection(train=SourceSection("digits", transforms=[{"random_shift": {"pixels": 1}}]))
SCHEDULE = {"type": "rsqrt", "params": {"warmup_steps": 3, "timescale_steps": 5, "cooldown_steps": 4}}
ADAM = {"type": "HalfPrecisionMomentumAdam", "params": {"lr": 3e-3, "weight_decay": 0.03}}
TORCH_ADAM = {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}}


def build_engine(
    cell: str,
    optimizer: dict[str, Any],
    *,
    model: ModelSection = MODEL,
    global_batch: int,
    accumulation: int = ACCUMULATION,
    policy: str = "none",
    compiled: bool = False,
    overrides: Sequence[Any] = (),
    flats: int = 0,
) -> tuple[TrainingEngine, ViTForImageClassification]:
    """The engine of a cell, and its model; the masters are filled by whoever wants them."""
    with torch.device("meta"):
        vit = ViTForImageClassification(build_config(model))
    vit.set_activation_checkpointing(policy)
    params = optimizer["params"]
    groups = build_groups(
        vit.shapes, lr=params["lr"], weight_decay=params.get("weight_decay", 0.0),
        head_weight_decay=params.get("head_weight_decay"), decay_patterns=vit.decay_patterns(), overrides=overrides,
    )  # fmt: skip
    section = {**CELLS[cell], "train_batch_size": global_batch}
    section["train_micro_batch_size_per_gpu"] = global_batch // dist.world_size() // accumulation
    engine = TrainingEngine(vit, groups, optimizer, section, accumulation, flats or flat_elements(cell))
    if compiled:
        vit.compile_blocks(backend="aot_eager")  # what inductor does to the code is not ours to test
    return engine, vit


def initialise(engine: TrainingEngine, model: ViTForImageClassification) -> None:
    """The masters of seed 0."""
    for shard in engine.master_shards():
        value = model.initial_tensor(shard.name, 0).view(-1)
        shard.data.copy_(value[shard.start : shard.start + shard.data.numel()])
    engine.refresh_weights()


def one_step(engine: TrainingEngine, batches: Iterable[Batch], drop: bool = False) -> tuple[float, bool]:
    """One step over this rank's micro batches: the mean loss over all ranks, and whether there was an update."""
    losses = list[torch.Tensor]()
    for batch in batches:
        if losses:
            engine.step()
        images, labels = to_model_range(batch.images, engine.device), batch.labels.to(engine.device)
        loss = engine(images, labels=labels).loss
        engine.backward(loss)
        losses.append(loss.detach())
    return engine.mean_loss(losses), engine.step(drop=drop)


def leave_with(directory: Path, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """End this rank's script; what it has found lies in `directory` for the test."""
    (directory / f"rank{dist.rank()}.json").write_text(json.dumps(facts))
    save_file(tensors, str(directory / f"rank{dist.rank()}.safetensors"))
    dist.leave(0)
