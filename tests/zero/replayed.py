"""Dropped batches and replays in the middle of training, in every cell; run as a script under `deepspeed`.

Each cell is trained twice: by a stream that leaves three batches out, and by one in which they come and are dropped,
the first with nothing amiss, the second with an image that is nan on one rank, the third for its gradient alone, and
each is replayed. Written per rank: what the replays named, what differs at the end, and what poisoned weights are named.
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.zero.cells import ACCUMULATION, CELLS
from tests.zero.small import ADAM, DATA, TORCH_ADAM, build_engine, initialise, one_step
from vitds import dist
from vitds.data import Batch, TrainLoader, build_sources, to_model_range
from vitds.models.losses import LOSSES, sigmoid_cross_entropy
from vitds.zero import explain, init_distributed
from vitds.zero.replay import first_nonfinite

BATCH, BATCHES = 8, 8
DROPPED, POISONED, STEEP = 0, 3, 5
LEFT_OUT = [(n * BATCH, (n + 1) * BATCH) for n in (DROPPED, POISONED, STEEP)]
ADAFACTOR = {"type": "ModifiedAdafactor", "params": {"lr": 5e-3, "weight_decay": 0.03}}


NORM_NOT_ASKED = {
    **CELLS["bf16 z2"],
    "gradient_clipping": 0.0,
    "zero_optimization": {**CELLS["bf16 z2"]["zero_optimization"], "compute_grad_norm": False},
}


class Run(NamedTuple):
    cell: str
    optimizer: dict[str, Any] = ADAM
    policy: str = "none"
    compiled: bool = False


RUNS = {
    **{cell: Run(cell) for cell in CELLS},
    **{f"{cell} full": Run(cell, ADAFACTOR, policy="full") for cell in ("fp32 z0", "fp32 z2", "fp32 z3", "bf16 z1", "bf16 z3")},
    "fp32 z0 compiled": Run("fp32 z0", compiled=True),
    "fp32 z2 compiled full": Run("fp32 z2", policy="full", compiled=True),
    "fp32 z3 compiled selective": Run("fp32 z3", policy="selective", compiled=True),
    "bf16 z0 DeepSpeed Adam": Run("bf16 z0", TORCH_ADAM),
    "bf16 z3 DeepSpeed Adam": Run("bf16 z3", TORCH_ADAM),
    "bf16 z2 norm not asked": Run("bf16 z2 norm not asked"),
}  # fmt: skip
ALWAYS = (
    "fp32 z0", "fp32 z2", "fp32 z3", "bf16 z0", "bf16 z1 fp32 sums", "bf16 z3", "fp32 z3 full", "fp32 z2 compiled full",
    "bf16 z3 DeepSpeed Adam", "bf16 z2 norm not asked",
)  # fmt: skip
"""What `make test` tries; `make torture` tries all."""


def tried() -> dict[str, Run]:
    """The runs of this session on this machine."""
    return {
        name: run
        for name, run in RUNS.items()
        if (name in ALWAYS or os.environ.get("VITDS_TORTURE"))
        and (torch.cuda.is_available() or not run.cell.startswith("fp16"))
    }


steep = False


def steep_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The usual loss; where it is steep, of the same finite value with a gradient of nan."""
    loss = sigmoid_cross_entropy(logits, labels)
    return loss + torch.sqrt(0 * logits.float().sum()) if steep else loss


class Trainer:
    def __init__(self, run: Run, skipped: list[tuple[int, int]]) -> None:
        self.engine, model = build_engine(
            run.cell, run.optimizer, global_batch=BATCH, policy=run.policy, compiled=run.compiled
        )
        initialise(self.engine, model)
        source = build_sources(DATA, 10).train
        self.loader = TrainLoader(
            source, DATA, image_size=8, num_classes=10, seed=0, global_batch=BATCH, rank=dist.rank(),
            world_size=dist.world_size(), skipped=skipped, micro_batch=BATCH // dist.world_size() // ACCUMULATION,
        )  # fmt: skip

    def batches(self) -> list[Batch]:
        return [next(self.loader) for _ in range(ACCUMULATION)]

    def step(self, batches: list[Batch], drop: bool = False) -> tuple[float, bool]:
        return one_step(self.engine, batches, drop)

    def held(self) -> dict[str, torch.Tensor]:
        shards = [*self.engine.master_shards(), *self.engine.state_shards()]
        found = {f"{shard.name}|{shard.start}": shard.data.detach().cpu().clone() for shard in shards}
        weights = self.engine.deepspeed.module.named_parameters()
        return found | {f"weight {name}": p.detach().cpu().clone() for name, p in weights}

    def poison(self, name: str, value: float) -> None:
        for shard in self.engine.master_shards():
            if shard.name == name:
                shard.data.fill_(value)
        self.engine.refresh_weights()


def with_nan(batches: list[Batch]) -> list[Batch]:
    """On rank 1 the second micro batch holds an image that is nan in one place."""
    if dist.rank() != 1:
        return batches
    images = to_model_range(batches[1].images, "cpu").clone()
    images[0, 0, 0, 0] = math.nan
    return [batches[0], replace(batches[1], images=images)]


def run(this: Run) -> dict[str, Any]:
    global steep
    reference = Trainer(this, LEFT_OUT)
    expected = [reference.step(reference.batches())[0] for _ in range(BATCHES - len(LEFT_OUT))]
    held, counters = reference.held(), reference.engine.counters()
    reference.engine.close()

    trainer = Trainer(this, [])
    engine, losses, facts = trainer.engine, [], {"wrapper": trainer.engine.wrapper_name}
    scaled = this.cell.startswith("fp16")
    written: list[Any] = []

    def event(kind: str, **more: Any) -> None:
        written.append([kind, more])

    for number in range(BATCHES):
        batches = trainer.batches()
        if number == DROPPED:
            loss, updated = trainer.step(batches, drop=True)
            facts["dropped"] = [math.isfinite(loss), updated, first_nonfinite(engine, batches) is None]
        elif number == POISONED:
            batches = with_nan(batches)
            loss, updated = trainer.step(batches, drop=True)
            facts["images"] = [math.isfinite(loss), updated, vars(first_nonfinite(engine, batches))]
        elif number == STEEP:
            steep = dist.rank() == 0
            loss, updated = trainer.step(batches, drop=scaled)  # an overflow moves the loss scale, as it must
            said = explain(engine, batches, trainer.loader.keys, event, 4)
            facts["gradient"] = [math.isfinite(loss), updated, said, written]
            steep = False
        else:
            losses.append(trainer.step(batches)[0])
    facts["losses_differ"] = [n for n, (one, other) in enumerate(zip(expected, losses, strict=True)) if one != other]
    again = trainer.held()
    facts["differing"] = [key for key in held if not torch.equal(held[key], again[key])]
    facts["counters"] = [counters, engine.counters()]

    trainer.poison("blocks.1.mlp.fc1.weight", 6e4 if scaled else 1e38)
    facts["output"] = vars(first_nonfinite(engine, batches))
    trainer.poison("blocks.1.mlp.fc1.weight", math.inf)
    facts["weight"] = vars(first_nonfinite(engine, batches))
    engine.close()
    return facts


def main(directory: Path, only: list[str]) -> None:
    init_distributed()
    LOSSES["sigmoid"] = steep_loss
    CELLS["bf16 z2 norm not asked"] = NORM_NOT_ASKED  # in this process, not in those that try every cell
    facts = {name: run(RUNS[name]) for name in only or tried()}
    (directory / f"rank{dist.rank()}.json").write_text(json.dumps(facts))
    dist.leave(0)


if __name__ == "__main__":
    place, *names = (word for word in sys.argv[1:] if not word.startswith("--"))
    main(Path(place), names)
