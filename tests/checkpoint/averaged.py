"""A small ViT in bf16, averaged while it trains and evaluated with the average; run as a script under `deepspeed`.

Each rank leaves its findings as JSON: how far the average is from a float64 reference, and whether all bits came back.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.zero.small import MODEL, build_engine, initialise
from vitds import dist
from vitds.checkpoint import ema as ema_module
from vitds.checkpoint.ema import Ema
from vitds.errors import Preempted
from vitds.layout import Shard
from vitds.models import ViTForImageClassification, build_config
from vitds.zero import TrainingEngine, init_distributed

STEPS, DECAY = 6, 0.8
ADAFACTOR = {"type": "ModifiedAdafactor", "params": {"lr": 2e-2, "weight_decay": 0.03}}
FROZEN: list[Any] = [[r"blocks\.0\..*|pos_embed", {"frozen": True}]]


def bits(shards: list[Shard]) -> list[torch.Tensor]:
    return [shard.data.detach().cpu().clone().view(torch.uint8) for shard in shards]


def weights(engine: TrainingEngine) -> list[torch.Tensor]:
    """Copies of the 16-bit weights that this rank computes with, or its part of them."""
    found = [getattr(p, "ds_tensor", p).data for p in engine.partitions.parameters.values()]
    return [tensor.detach().cpu().clone().view(-1).view(torch.uint8) for tensor in found]


def held(engine: TrainingEngine, ema: Ema) -> list[torch.Tensor]:
    return [*bits(engine.master_shards()), *bits(engine.state_shards()), *bits(ema.shards()), *weights(engine)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def raising(engine: TrainingEngine, ema: Ema, error: Exception) -> None:
    try:
        with ema.exchanged(engine.refresh_weights):
            raise error
    except type(error):
        pass


@torch.no_grad()
def logits(engine: TrainingEngine, images: torch.Tensor) -> torch.Tensor:
    engine.train(False)
    found: torch.Tensor = engine(images).logits
    engine.train(True)
    return found.float()


def plain_logits(shards: list[Shard], images: torch.Tensor) -> torch.Tensor:
    """Of an ordinary model with the whole tensors that the ranks' shards make up."""
    model = ViTForImageClassification(build_config(MODEL))
    whole = {name: torch.full(parameter.shape, float("nan")) for name, parameter in model.named_parameters()}
    for rank in dist.all_objects([(shard.name, shard.start, shard.data.cpu()) for shard in shards]):
        for name, start, data in rank:
            whole[name].view(-1)[start : start + data.numel()] = data
    model.load_state_dict(whole)
    with torch.no_grad():
        found: torch.Tensor = model.eval().to(torch.bfloat16)(images).logits
    return found.float()


def run(cell: str) -> dict[str, Any]:
    engine, model = build_engine(cell, ADAFACTOR, global_batch=4 * dist.world_size(), accumulation=1, overrides=FROZEN)
    initialise(engine, model)
    frozen = [name for group in engine.groups.values() if group.frozen for name in group.names]
    ema = Ema(engine.master_shards, DECAY, frozen)
    ema.reset()
    reference = [shard.data.double() for shard in engine.master_shards()]
    generator = torch.Generator().manual_seed(dist.rank())
    for _ in range(STEPS):
        images = torch.randn(4, 3, 8, 8, generator=generator).bfloat16()
        engine.backward(engine(images, labels=torch.randint(10, (4,), generator=generator)).loss)
        engine.step()
        ema.update()
        for average, shard in zip(reference, engine.master_shards(), strict=True):
            average.mul_(DECAY).add_(shard.data.double(), alpha=1 - DECAY)

    facts: dict[str, Any] = {}
    apart = [(s.data.double() - r).abs().max() for s, r in zip(ema.shards(), reference, strict=True) if r.numel()]
    moved = [
        (s.data.double() - r).abs().max() for s, r in zip(engine.master_shards(), reference, strict=True) if r.numel()
    ]
    facts["apart"], facts["moved"] = float(max(apart)), float(max(moved))
    before, masters, averages = held(engine, ema), bits(engine.master_shards()), bits(ema.shards())
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(9)).bfloat16()
    own, expected = logits(engine, images), plain_logits(ema.shards(), images)
    with ema.exchanged(engine.refresh_weights):
        facts["exchanged"] = equal(bits(engine.master_shards()), averages) and equal(bits(ema.shards()), masters)
        within = logits(engine, images)
    facts["evaluated apart"] = float((within - expected).abs().max())
    facts["own apart"] = float((own - expected).abs().max())
    facts["back"] = equal(held(engine, ema), before)
    raising(engine, ema, Preempted("SIGTERM"))
    facts["back after an agreed error"] = equal(held(engine, ema), before)
    raising(engine, ema, RuntimeError("mine alone"))
    facts["masters back after an error of one"] = equal(
        [*bits(engine.master_shards()), *bits(ema.shards())], [*masters, *averages]
    )
    engine.refresh_weights()
    facts["all back"] = equal(held(engine, ema), before)
    facts["same bits evaluated"] = torch.equal(logits(engine, images), own)
    engine.close()
    return facts


def main(directory: Path) -> None:
    init_distributed()
    ema_module.CHUNK_ELEMENTS = 97
    facts = {cell: run(cell) for cell in ("bf16 z2", "bf16 z3", "bf16 z0")}
    (directory / f"rank{dist.rank()}.json").write_text(json.dumps(facts))
    dist.leave(0)


if __name__ == "__main__":
    main(Path(next(word for word in sys.argv[1:] if not word.startswith("--"))))
