"""A small ViT of which a part is frozen, trained by SGD with clipping in the cells of CASES; run as a script on some ranks.

Each rank asserts that what is frozen keeps its bits and costs nothing, and leaves for the test the norms of all steps, the
final masters, and the names that a checkpoint holds.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.zero.small import SCHEDULE, build_engine, leave_with
from vitds import dist
from vitds.checkpoint import CheckpointSection, open_checkpoint
from vitds.checkpoint.format import MODEL as WEIGHTS
from vitds.checkpoint.format import OPTIMIZER
from vitds.checkpoint.progress import Progress
from vitds.checkpoint.state import RunState
from vitds.models import ModelSection, VitdsImageProcessor, ViTForImageClassification, build_config
from vitds.run_directory import RunDirectory
from vitds.schedules import build_schedule
from vitds.zero import TrainingEngine, init_distributed

MODEL = ModelSection(
    width=32, depth=3, mlp_dim=48, num_heads=2, patch_size=4, image_size=8, num_classes=5, loss="softmax", pool="map"
)
SGD: dict[str, Any] = {"type": "HalfPrecisionMomentumSGD", "params": {"lr": 0.1, "momentum": 0.9}}
STEPS, BATCH, MICRO_BATCHES, CLIP = 4, 12, 2, 0.5
FROZEN: dict[str, list[Any]] = {
    "trunk": [[r"(?!head\.).*", {"frozen": True}]],
    "layers": [
        [r"patch_embed\..*|pos_embed|blocks\.[02]\..*|.*\.bias", {"frozen": True}],
        [r"attn_pool\..*", {"lr_mult": 0.5}],
    ],
}
"""All but the classifier; and what gradients pass through, on both sides of what is trained."""
CASES: dict[str, tuple[int, ...]] = {
    "fp32 z0": (2,), "fp32 z1": (2,), "fp32 z2": (1, 2, 3), "fp32 z3": (2,), "fp32 z2 small flats": (2,),
    "bf16 z0": (2,), "bf16 z1": (2,), "bf16 z1 fp32 sums": (2,), "bf16 z2": (2,), "bf16 z3": (2, 3), "masters z2": (2,),
}  # fmt: skip
"""Cell -> on how many ranks `make test` tries it; `make torture` tries all of them on all."""


def start() -> dict[str, torch.Tensor]:
    """The parameters at step 0, fp32, no zeros among them: a classifier at zero would let no gradient pass."""
    with torch.device("meta"):
        model = ViTForImageClassification(build_config(MODEL))
    generator = torch.Generator().manual_seed(0)
    return {
        name: model.initial_tensor(name, 0) + 0.1 * torch.randn(shape, generator=generator)
        for name, shape in model.shapes.items()
    }


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole batch of a step: images (BATCH, 3, 8, 8) in [−1, 1] that bf16 holds exactly, and labels (BATCH,)."""
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randint(-8, 9, (BATCH, 3, 8, 8), generator=generator) / 8
    return images, torch.randint(5, (BATCH,), generator=generator)


def bits(engine: TrainingEngine, names: set[str]) -> dict[str, list[int]]:
    """Of these parameters, the bytes of this rank's masters and of the weights that it computes with, without padding."""
    shards = {s.name: s.data for s in engine.master_shards() if s.name in names}
    found = dict(shards)
    for name in names:
        parameter: Any = engine.partitions.parameters[name]
        part = parameter.ds_tensor.data.view(-1)[: shards[name].numel()] if engine.stage == 3 else parameter.data
        found[f"computing {name}"] = part
    return {name: data.detach().reshape(-1).view(torch.uint8).tolist() for name, data in found.items()}


def train(engine: TrainingEngine, first: int, last: int) -> list[float]:
    """Steps `first` to `last`; the norm of each."""
    ranks, norms = dist.world_size(), []
    for step in range(first, last):
        engine.set_learning_rate(1.0)
        images, labels = batch(step)
        mine = [part.chunk(ranks)[dist.rank()] for part in (images, labels)]
        losses = []
        for inputs, classes in zip(*(part.chunk(MICRO_BATCHES) for part in mine), strict=True):
            if losses:
                engine.step()
            loss = engine(inputs.to(engine.device), labels=classes.to(engine.device)).loss
            engine.backward(loss)
            losses.append(loss.detach())
        engine.mean_loss(losses)
        assert engine.step()
        norms.append(engine.gradient_norm)
    return norms


def run(cell: str, part: str, scratch: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """One engine that trains all steps and saves half way, and a second one that goes on from there."""
    values = start()

    def begin() -> tuple[TrainingEngine, RunState, set[str]]:
        engine, model = build_engine(
            cell, SGD, model=MODEL, global_batch=BATCH, accumulation=MICRO_BATCHES, overrides=FROZEN[part],
            policy="full" if part == "layers" else "none",
        )  # fmt: skip
        resolved = {"vitds": {"train": {"seed": 0}}, "optimizer": SGD, "train_batch_size": BATCH}
        schedule = build_schedule(SCHEDULE, total_steps=100, global_batch=BATCH)
        state = RunState(
            engine, model, schedule, resolved, VitdsImageProcessor(8, 8), RunDirectory(scratch), CheckpointSection()
        )
        return engine, state, {name for g in engine.groups.values() if g.frozen for name in g.names}

    engine, state, frozen = begin()
    for shard in engine.master_shards():
        shard.data.copy_(values[shard.name].view(-1)[shard.start : shard.start + shard.data.numel()])
    engine.refresh_weights()
    before = bits(engine, frozen)
    norms = train(engine, 0, STEPS // 2)
    state.finish(Progress(step=STEPS // 2))
    norms += train(engine, STEPS // 2, STEPS)
    assert bits(engine, frozen) == before, f"{cell} {part}: frozen bits have changed"
    parameters = engine.partitions.parameters
    assert not [name for name in frozen if parameters[name].grad is not None], f"{cell} {part}: frozen gradients"
    trained = sum(fragment.numel for flat in engine.partitions.flats for fragment in flat.fragments)
    held = sum(
        v.numel() for s in engine.optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.numel() > 1
    )
    slack = 256 * len(engine.partitions.flats)  # padding of flats
    assert held <= trained + slack, f"{cell} {part}: state of {held} elements for {trained} trained ones"
    final = {f"{s.name}|{s.start}": s.data.detach().float().cpu().clone() for s in engine.master_shards()}
    final_bits = bits(engine, set(parameters))
    engine.close()

    engine, state, _ = begin()
    progress, origin = state.restore()
    assert progress.step == STEPS // 2, origin
    again = train(engine, STEPS // 2, STEPS)
    assert again == norms[STEPS // 2 :], f"{cell} {part}: a resumed run has other norms"
    assert bits(engine, set(parameters)) == final_bits, f"{cell} {part}: a resumed run ends with other bits"
    saved = open_checkpoint(scratch / "checkpoints" / f"step-{STEPS // 2:09d}").kinds
    engine.close()
    return {
        "norms": norms,
        "frozen": sorted(frozen),
        "state": sorted(saved[OPTIMIZER]),
        "weights": sorted(saved[WEIGHTS]),
    }, final


def main(directory: Path) -> None:
    init_distributed()
    facts, tensors = {}, {}
    for cell, worlds in CASES.items():
        if dist.world_size() in worlds or os.environ.get("VITDS_TORTURE"):
            for part in FROZEN:
                scratch = Path(dist.broadcast_object(tempfile.mkdtemp(dir=directory) if dist.is_main() else None))
                facts[f"{cell}, {part}"], held = run(cell, part, scratch)
                tensors |= {f"{cell}, {part}|{key}": value for key, value in held.items()}
    leave_with(directory, facts, tensors)


if __name__ == "__main__":
    main(Path(next(word for word in sys.argv[1:] if not word.startswith("--"))))
