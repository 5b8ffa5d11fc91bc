"""What a step spends beside arithmetic: memory of the model's state, and waits of the host for the device.

Run as a script on some ranks it trains a small ViT on one image in cells of CASES, with flats and buckets that are small
beside the model, and writes what rank 0 saw in its third step.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.live_memory import live_memory
from tests.zero import cells, small
from vitds import dist
from vitds.models import ModelSection
from vitds.zero import init_distributed

MODEL = ModelSection(
    width=128, depth=8, mlp_dim=512, num_heads=2, patch_size=4, image_size=8, num_classes=10, loss="sigmoid"
)
ADAFACTOR = {"type": "ModifiedAdafactor", "params": {"lr": 5e-3, "weight_decay": 0.03}}
MICRO_BATCHES = 2
LIMIT = 2**16
"""Elements of a rank's flat and of a bucket: a twenty-fifth of the model."""
CASES = {
    "fp32 z2": 4, "bf16 z1": 2, "bf16 z1 fp32 sums": 4, "bf16 z2": 4, "bf16 z2 bf16 sums": 2, "bf16 z2 overlapping": 4, "bf16 z3": 4,
}  # fmt: skip
"""Cell: bytes of a gradient's element."""
WAITING = (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy)


class _Reading(TorchFunctionMode):
    """Counts reads that leave no trace below Python where the device is the host."""

    def __init__(self, count: Counter[str]) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in WAITING:
            self.count[function.__name__] += 1
        return function(*args, **(kwargs or {}))


class _Scalars(TorchDispatchMode):
    """Counts `item()`, `bool(…)`, `float(…)` and whatever else makes a number of a tensor."""

    def __init__(self, count: Counter[str]) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.equal,
            torch.ops.aten.nonzero,
        ):
            self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """While open, counts by kind what would make the host wait for a GPU."""
    count, here = Counter[str](), get_accelerator()
    real = here.synchronize

    def synchronize(*given: Any, **named: Any) -> Any:
        count["synchronize"] += 1
        return real(*given, **named)

    here.synchronize = synchronize
    try:
        with _Reading(count), _Scalars(count):
            yield count
    finally:
        del here.synchronize


def spend(cell: str) -> dict[str, Any]:
    """Peak bytes and waits of the third step, in one cell."""
    zero = cells.CELLS[cell]["zero_optimization"] | {"reduce_bucket_size": LIMIT, "sub_group_size": LIMIT}
    if zero["stage"] == 3:
        zero |= {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": LIMIT, "stage3_max_reuse_distance": 0}
    cells.CELLS["spent"] = {**cells.CELLS[cell], "communication_data_type": "bf16", "zero_optimization": zero}
    image, label = torch.randn(1, 3, 8, 8), torch.zeros(1, dtype=torch.long)
    facts: dict[str, Any] = {"micro batch": [], "step": {}}
    with live_memory() as seen:
        engine, model = small.build_engine(
            "spent", ADAFACTOR, model=MODEL, global_batch=MICRO_BATCHES * dist.world_size(), accumulation=MICRO_BATCHES,
            flats=LIMIT,
        )  # fmt: skip
        for step in range(3):
            engine.set_learning_rate(1.0)
            seen.part(f"step {step}")
            losses = []
            for _ in range(MICRO_BATCHES):
                with waits() as count:
                    if losses:
                        engine.step()
                    loss = engine(image, labels=label).loss
                    engine.backward(loss)
                losses.append(loss.detach())
                del loss
                facts["micro batch"] = [*facts["micro batch"], dict(count)][-MICRO_BATCHES:]
            with waits() as count:
                engine.mean_loss(losses)
                assert engine.step()
            facts["step"] = dict(count)
        facts |= {"peak": seen.peaks["step 2"], "where": seen.where(2**16), "wrapper": engine.wrapper_name}
        facts["parameters"] = sum(p.numel() if not hasattr(p, "ds_numel") else p.ds_numel for p in model.parameters())
        engine.close()
    return facts


def main(directory: Path) -> None:
    init_distributed()
    found = {cell: spend(cell) for cell in CASES}
    if dist.is_main():
        (directory / "spent.json").write_text(json.dumps(found))
    dist.leave(0)


if __name__ == "__main__":
    main(Path(next(word for word in sys.argv[1:] if not word.startswith("--"))))
