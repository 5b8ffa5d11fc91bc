"""The ranks' script of test_started.py: engines under every stage take their masters from files of every kind."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.zero.small import ADAM, build_engine
from vitds import dist
from vitds.checkpoint.exchange.weights import open_weights
from vitds.checkpoint.start import Start
from vitds.models import ModelSection
from vitds.schedules import build_schedule
from vitds.zero import init_distributed
from vitds.zero.engine import TrainingEngine

CELLS = ("fp32 z0", "fp32 z1", "bf16 z1 small flats", "fp32 z2", "bf16 z2", "bf16 z3", "fp32 z3 tiny sub-groups")
BIAS = -2.0
SHAPE: dict[str, Any] = {"width": 24, "depth": 3, "mlp_dim": 40, "num_heads": 3, "patch_size": 4}
MODELS = {
    "same": ModelSection(**SHAPE, num_classes=7, image_size=20, init_head_bias=BIAS),
    "other": ModelSection(**SHAPE, num_classes=4, image_size=28),
}


def main(directory: Path) -> None:
    init_distributed()
    differing, said = [], {}
    for target, model in MODELS.items():
        expected = load_file(directory / f"{target}.expected.safetensors")
        for cell in CELLS:
            engine, vit = build_engine(cell, ADAM, model=model, global_batch=12)
            schedule = build_schedule({"type": "constant", "params": {}}, total_steps=1, global_batch=12)
            start = Start(engine, vit, schedule, {"vitds": {"train": {"seed": 0}}}, None)
            for path in sorted(directory.glob("from.*")):
                with torch.no_grad():
                    for shard in engine.master_shards():
                        shard.data.fill_(torch.nan)
                said[f"{target} {path.name}"] = start.transfer(
                    open_weights(path), "keep" if target == "same" else "auto"
                )
                differing += [f"{target}, {cell}, {path.name}: {name}" for name in wrong(engine, expected)]
            engine.close()
    if dist.is_main():
        (directory / "found.json").write_text(json.dumps({"said": said}))
    (directory / f"differing{dist.rank()}.json").write_text(json.dumps(differing))
    dist.leave(0)


def wrong(engine: TrainingEngine, expected: dict[str, torch.Tensor]) -> list[str]:
    """Masters of this rank that are not what is expected, bit for bit."""
    return [
        shard.name
        for shard in engine.master_shards()
        if not torch.equal(
            shard.data.detach().cpu(), expected[shard.name].view(-1)[shard.start : shard.start + shard.data.numel()]
        )
    ]


if __name__ == "__main__":
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    main(Path(next(word for word in sys.argv[1:] if not word.startswith("--"))))
