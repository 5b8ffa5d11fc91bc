"""Counts what ranks really say to each other in one optimizer step; run as a script under `deepspeed`.

Every collective of torch.distributed is wrapped before DeepSpeed is imported. A small ViT is trained in every cell of
RUNS; rank 0 writes what was counted in a step of a run under way.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist

COUNTED: list[tuple[str, int, int]] | None = None
"""(kind, bytes, ranks) of every collective while it is a list."""


def size_of(kind: str, given: dict[str, Any], positional: tuple[Any, ...]) -> torch.Tensor:
    """The whole tensor of a collective: what is reduced or scattered, or what comes of a gather."""
    name, place = {"all_gather": ("output_tensor", 0), "reduce_scatter": ("input", 1)}.get(kind, ("tensor", 0))
    tensor = given[name] if name in given else positional[place]
    assert isinstance(tensor, torch.Tensor)
    return tensor


def wrap(function_name: str, kind: str) -> None:
    """Count calls of torch.distributed.`function_name` as `kind`."""
    inner: Callable[..., Any] = getattr(torch_dist, function_name)

    def counting(*positional: Any, **given: Any) -> Any:
        if COUNTED is not None:
            group = given.get("group", next((p for p in positional if isinstance(p, torch_dist.ProcessGroup)), None))
            size = size_of(kind, given, positional).nbytes if kind != "unknown" else -1
            COUNTED.append((kind if kind != "unknown" else function_name, size, torch_dist.get_world_size(group)))
        return inner(*positional, **given)

    setattr(torch_dist, function_name, counting)


for name in ("all_reduce", "reduce", "broadcast"):
    wrap(name, name)
wrap("all_gather_into_tensor", "all_gather")
wrap("reduce_scatter_tensor", "reduce_scatter")
for name in (
    "all_gather", "reduce_scatter", "all_to_all", "all_to_all_single", "gather", "scatter", "send", "recv", "isend", "irecv",
    "all_reduce_coalesced", "all_gather_object", "broadcast_object_list", "barrier", "batch_isend_irecv",
):  # fmt: skip
    wrap(name, "unknown")  # none of these is predicted: to see one is to be wrong

from tests.zero import cells, small  # noqa: E402  (DeepSpeed keeps the functions that it finds when it is imported)
from vitds import dist  # noqa: E402
from vitds.data import TrainLoader, build_sources  # noqa: E402
from vitds.zero import init_distributed  # noqa: E402

ADAFACTOR = {"type": "ModifiedAdafactor", "params": {"lr": 5e-3, "weight_decay": 0.03, "head_weight_decay": 3.0}}
CLIPPED = {"type": "ModifiedAdafactor", "params": {**ADAFACTOR["params"], "clipping_threshold": 1.0}}  # type: ignore[dict-item]
BF16_COMM = {"communication_data_type": "bf16"}
STEPS = 3
"""ZeRO-3 learns the order of modules in the first micro batch, and in the second decides what to keep."""


def cell(base: str, more: dict[str, Any] | None = None, **zero: Any) -> dict[str, Any]:
    """A section of tests/zero/cells.py with other keys."""
    section = {**cells.CELLS[base], **(more or {})}
    return {**section, "zero_optimization": {**section["zero_optimization"], **zero}}


TIGHT: dict[str, Any] = {
    "stage3_prefetch_bucket_size": 9000,
    "stage3_max_live_parameters": 60000,
    "stage3_max_reuse_distance": 20000,
}
SECTIONS: dict[str, dict[str, Any]] = {
    **{name: cells.CELLS[name] for name in ("fp32 z0", "fp32 z1", "fp32 z2", "fp32 z3")},
    **{name: cells.CELLS[name] for name in ("bf16 z0", "bf16 z1", "bf16 z1 fp32 sums", "bf16 z2", "bf16 z3")},
    **{name: cells.CELLS[name] for name in cells.CELLS if name.endswith("small flats")},
    "bf16 z2 bf16 sent": cell("bf16 z2", BF16_COMM),
    "fp32 z2 overlapping": cell("fp32 z2", overlap_comm=True),
    "fp32 z2 one owner a bucket": cell("fp32 z2", use_multi_rank_bucket_allreduce=False),
    "fp32 z2 no reduce-scatter": cells.CELLS["fp32 z2 no reduce-scatter"],
    "bf16 z3 persistent": cell("bf16 z3", BF16_COMM, stage3_param_persistence_threshold=200),
    "bf16 z3 tiny sub-groups": cells.CELLS["bf16 z3 tiny sub-groups"],
    "bf16 z3 tight": cell("bf16 z3", **TIGHT),
    "bf16 z3 tight persistent": cell("bf16 z3", **TIGHT, stage3_param_persistence_threshold=200),
    "fp32 z3 nothing ahead": cell("fp32 z3", stage3_prefetch_bucket_size=0, stage3_max_reuse_distance=0),
    "fp32 z3 ahead": cell("fp32 z3", stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=30000),
    "fp32 z3 no reduce-scatter": cell("fp32 z3", reduce_scatter=False),
}
HPZ: dict[str, dict[str, Any]] = {
    f"{name} hpZ": cell(name, zero_hpz_partition_size=2, **more)
    for name, more in {"fp32 z3": {}, "bf16 z3": {**TIGHT, "stage3_param_persistence_threshold": 200}}.items()
}
SECTIONS |= HPZ


@dataclass(frozen=True)
class Run:
    """One cell: its section, micro batches, activation checkpointing, optimizer, and what is not trained."""

    section: str
    micro_batches: int = 2
    policy: str = "none"
    optimizer: dict[str, Any] = field(default_factory=lambda: ADAFACTOR)
    frozen: tuple[Any, ...] = ()
    ranks: tuple[int, ...] = (2, 3)
    quick: bool = False
    """Whether `make test` counts it too, on two ranks."""


QUICK = ("fp32 z0", "fp32 z1", "fp32 z2", "fp32 z3", "bf16 z0", "bf16 z1", "bf16 z2", "bf16 z3",
         "bf16 z1 fp32 sums small flats", "bf16 z2 small flats")  # fmt: skip
FROZEN = ([r"blocks\.0\..*|pos_embed", {"frozen": True}],)
RUNS: dict[str, Run] = {
    **{f"{name}, 1 micro": Run(name, 1, quick=name in QUICK[:4]) for name in SECTIONS if name not in HPZ},
    **{f"{name}, 2 micro": Run(name, quick=name in QUICK) for name in SECTIONS if name not in HPZ},
    **{f"{name}, {count} micro": Run(name, count, ranks=(4,)) for name in HPZ for count in (1, 2)},
    "bf16 z1 fp32 sums, 3 micro": Run("bf16 z1 fp32 sums", 3, quick=True),
    "fp32 z2 clipped updates": Run("fp32 z2", 1, optimizer=CLIPPED),
    "bf16 z2 Adam": Run("bf16 z2", optimizer=small.ADAM),
    "bf16 z3 tight persistent, 3 micro, full": Run("bf16 z3 tight persistent", 3, "full", quick=True),
    **{f"{name}, {policy}": Run(name, policy=policy)
       for name in ("bf16 z3", "bf16 z3 tight", "fp32 z3 nothing ahead") for policy in ("full", "every:2", "selective")},
    **{f"{name}, frozen": Run(name, frozen=FROZEN)
       for name in ("fp32 z0", "fp32 z1", "bf16 z1 fp32 sums", "bf16 z2", "fp32 z3", "bf16 z3 tight")},
}  # fmt: skip


def chosen(ranks: int) -> dict[str, Run]:
    """The cells for a number of ranks; all of them under VITDS_TORTURE."""
    everything = bool(os.environ.get("VITDS_TORTURE"))
    return {name: run for name, run in RUNS.items() if ranks in run.ranks and (everything or run.quick)}


def count(run: Run) -> list[tuple[str, int, int]]:
    """The collectives of one step."""
    global COUNTED
    ranks = dist.world_size()
    batch = run.micro_batches * ranks
    cells.CELLS.setdefault(run.section, SECTIONS[run.section])
    engine, model = small.build_engine(
        run.section,
        run.optimizer,
        global_batch=batch,
        accumulation=run.micro_batches,
        policy=run.policy,
        overrides=run.frozen,
    )
    small.initialise(engine, model)
    source = build_sources(small.DATA, 10).train
    loader = TrainLoader(
        source, small.DATA, rank=dist.rank(), world_size=ranks, position=0, image_size=8, num_classes=10, seed=0,
        global_batch=batch, micro_batch=1,
    )  # fmt: skip
    engine.set_learning_rate(1.0)
    found: list[tuple[str, int, int]] = []
    for _ in range(STEPS):
        batches = [next(loader) for _ in range(run.micro_batches)]
        COUNTED = found = []
        small.one_step(engine, batches)
        COUNTED = None
    loader.close()
    engine.close()
    return found


def main(directory: Path) -> None:
    init_distributed()
    found = {name: count(run) for name, run in chosen(dist.world_size()).items()}
    if dist.is_main():
        (directory / "counted.json").write_text(json.dumps(found))
    dist.leave(0)


if __name__ == "__main__":
    main(Path(next(word for word in sys.argv[1:] if not word.startswith("--"))))
