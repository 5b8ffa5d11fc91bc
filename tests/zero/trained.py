"""A small ViT trained on the digits in every cell of the matrix; run as a script under `deepspeed`.

Each cell is trained without a break, saving half way; then a new engine goes on from that checkpoint.
Written per rank: losses, final masters, and whether the two runs ended with the same bits.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.zero import small
from tests.zero.cells import ACCUMULATION, CELLS
from tests.zero.small import ADAM, DATA, SCHEDULE, TORCH_ADAM, build_engine, leave_with, one_step
from vitds import dist
from vitds.checkpoint import CheckpointSection
from vitds.checkpoint.state import RunState
from vitds.data import TrainLoader, build_sources
from vitds.models import VitdsImageProcessor
from vitds.run_directory import RunDirectory
from vitds.schedules import build_schedule
from vitds.zero import init_distributed, observed

STEPS, BATCH = 10, 12
MODEL = replace(small.MODEL, init_head_bias=-2.0)
ADAFACTOR = {"type": "ModifiedAdafactor", "params": {"lr": 5e-3, "weight_decay": 0.03, "head_weight_decay": 3.0}}

STAGES = ("fp32 z0", "fp32 z1", "fp32 z2", "fp32 z3")
ELSEWHERE = ("fp32 z1", "fp32 z2", "fp32 z3", "bf16 z2")
NEVER: tuple[int, ...] = ()
"""Worlds of what only `make torture` tries."""
FROZEN = [[r"blocks\.0\..*|pos_embed", {"frozen": True}], [r"norm\..*", {"lr_mult": 0.5}]]


@dataclass(frozen=True)
class Run:
    """What is trained, and on which world sizes `make test` tries it."""

    cell: str
    optimizer: dict[str, Any]
    worlds: tuple[int, ...] = (2,)
    policy: str = "none"
    compiled: bool = False
    overrides: Sequence[Any] = ()


RUNS: dict[str, Run] = {
    "fp32 z0 adafactor": Run("fp32 z0", ADAFACTOR, (1, 2)),
    "fp32 z0 adam": Run("fp32 z0", ADAM, (1, 2)),
    **{f"{cell} adafactor": Run(cell, ADAFACTOR, (1, 2, 3)) for cell in ELSEWHERE},
    **{
        f"{c} adafactor": Run(c, ADAFACTOR)
        for c in CELLS
        if c.split()[0] != "fp32" and c not in ELSEWHERE and "flats" not in c
    },
    "bf16 z1 small flats adafactor": Run("bf16 z1 small flats", ADAFACTOR),
    **{f"{cell} adam": Run(cell, ADAM) for cell in STAGES[1:]},
    "fp32 z2 full": Run("fp32 z2", ADAFACTOR, NEVER, policy="full"),  # the compiled one is tried
    "fp32 z2 every:2": Run("fp32 z2", ADAFACTOR, policy="every:2"),
    "fp32 z2 selective": Run("fp32 z2", ADAFACTOR, NEVER, policy="selective"),  # ZeRO-3 is where it can go wrong
    **{f"fp32 z3 {policy}": Run("fp32 z3", ADAFACTOR, policy=policy) for policy in ("full", "selective")},
    "fp32 z0 compiled": Run("fp32 z0", ADAFACTOR, NEVER, compiled=True),  # those under ZeRO-2 and 3 are tried
    "fp32 z2 compiled full": Run("fp32 z2", ADAFACTOR, policy="full", compiled=True),
    "fp32 z3 compiled selective": Run("fp32 z3", ADAFACTOR, policy="selective", compiled=True),
    **{f"{cell} frozen": Run(cell, ADAFACTOR, overrides=FROZEN) for cell in ("fp32 z0", "bf16 z2", "fp32 z3")},
    "bf16 z3 frozen": Run("bf16 z3", ADAFACTOR, NEVER, overrides=FROZEN),  # each half of it is tried
    "fp32 z2 torch RMSprop": Run("fp32 z2", {"type": "RMSprop", "params": {"lr": 1e-4}}),
    "bf16 z0 DeepSpeed Adam": Run("bf16 z0", TORCH_ADAM),
    "bf16 z3 DeepSpeed Adam": Run("bf16 z3", TORCH_ADAM),
}


class Trainer:
    """One engine with its state and stream."""

    def __init__(self, run: Run, directory: Path) -> None:
        self.engine, self.model = build_engine(
            run.cell, run.optimizer, model=MODEL, global_batch=BATCH, policy=run.policy, compiled=run.compiled,
            overrides=run.overrides,
        )  # fmt: skip
        self.schedule = build_schedule(SCHEDULE, total_steps=STEPS, global_batch=BATCH)
        resolved = {"vitds": {"train": {"seed": 0}}, "optimizer": run.optimizer, "train_batch_size": BATCH}
        processor, run_directory = VitdsImageProcessor(8, 8), RunDirectory(directory)
        self.state = RunState(
            self.engine, self.model, self.schedule, resolved, processor, run_directory, CheckpointSection()
        )
        self.source = build_sources(DATA, 10).train
        micro = BATCH // dist.world_size() // ACCUMULATION
        self.stream = {"image_size": 8, "num_classes": 10, "seed": 0, "global_batch": BATCH, "micro_batch": micro}
        self.go_on()

    def go_on(self) -> None:
        """From the newest checkpoint, or from the start."""
        self.progress, _ = self.state.restore()
        self.loader = TrainLoader(
            self.source,
            DATA,
            rank=dist.rank(),
            world_size=dist.world_size(),
            position=self.progress.position,
            **self.stream,
        )

    def train(self, until: int) -> list[float]:
        """Steps up to `until`; the mean loss of each."""
        losses = []
        while self.progress.step < until:
            self.engine.set_learning_rate(self.schedule(self.progress.step))
            loss, updated = one_step(self.engine, [next(self.loader) for _ in range(ACCUMULATION)])
            assert updated
            losses.append(loss)
            self.progress.advance(BATCH, updated)
        return losses

    def held(self) -> dict[str, torch.Tensor]:
        """Copies of this rank's masters and optimizer state."""
        shards = [*self.engine.master_shards(), *self.engine.state_shards()]
        return {f"{shard.name}|{shard.start}": shard.data.detach().cpu().clone() for shard in shards}


def run(name: str, scratch: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    this = RUNS[name]
    unbroken = Trainer(this, scratch)
    for shard in unbroken.engine.master_shards():
        initial = unbroken.model.initial_tensor(shard.name, 0).view(-1)[shard.start : shard.start + shard.data.numel()]
        assert torch.equal(shard.data.detach(), initial.to(shard.data.dtype)), (
            f"{name}: step-0 master {shard.name} is not the initial value"
        )
    losses = unbroken.train(STEPS // 2)
    unbroken.state.finish(unbroken.progress)
    losses += unbroken.train(STEPS - 1)
    for shard in unbroken.engine.master_shards():
        if this.overrides and shard.name.startswith(("blocks.0.", "pos_embed")):
            initial = unbroken.model.initial_tensor(shard.name, 0).view(-1)[
                shard.start : shard.start + shard.data.numel()
            ]
            assert torch.equal(shard.data, initial), f"{name}: frozen {shard.name} moved"
    before = unbroken.held()
    with observed(unbroken.engine) as norms:
        losses += unbroken.train(STEPS)
    final = unbroken.held()
    facts: dict[str, Any] = {
        "optimizer": this.optimizer["type"],
        "frozen": bool(this.overrides),
        "losses": losses,
        "grad_norm": unbroken.engine.gradient_norm,
        "wrapper": unbroken.engine.wrapper_name,
    }
    facts["observed_grad_norm"] = sum(n.gradient for n in norms.values()) ** 0.5
    facts["observed_weight"] = {n: v.weight for n, v in norms.items()}
    facts["observed_update"] = {n: v.update for n, v in norms.items()}
    moved = {k: final[k].float() - before[k].float() for k in final if k.split("|")[0] in norms}
    facts["own_update"] = {k: float(v.double().square().sum()) for k, v in moved.items()}

    if dist.world_size() == 2 or os.environ.get("VITDS_TORTURE"):
        unbroken.go_on()  # as after a loss spike: back to the checkpoint, in the engine that has gone further
        assert unbroken.progress.step == STEPS // 2
        facts["rolled_back_losses"] = unbroken.train(STEPS)
        once_more = unbroken.held()
        facts["differing_after_rollback"] = [key for key in final if not torch.equal(final[key], once_more[key])]
    unbroken.engine.close()

    second = Trainer(this, scratch)
    assert second.progress.step == STEPS // 2
    facts["resumed_losses"] = second.train(STEPS)
    again = second.held()
    facts["differing"] = [key for key in final if not torch.equal(final[key], again[key])]
    second.engine.close()
    return facts, {key: value for key, value in final.items() if key.split("|")[0] in norms}


def main(directory: Path) -> None:
    init_distributed()
    facts, tensors = {}, {}
    for name, this in RUNS.items():
        elsewhere = dist.world_size() not in this.worlds and not os.environ.get("VITDS_TORTURE")
        if elsewhere or (this.cell.startswith("fp16") and not torch.cuda.is_available()):
            continue
        scratch = Path(dist.broadcast_object(tempfile.mkdtemp(dir=directory) if dist.is_main() else None))
        facts[name], held = run(name, scratch)
        tensors |= {f"{name}|{key}": value for key, value in held.items()}
    leave_with(directory, facts, tensors)


if __name__ == "__main__":
    main(Path(next(word for word in sys.argv[1:] if not word.startswith("--"))))
