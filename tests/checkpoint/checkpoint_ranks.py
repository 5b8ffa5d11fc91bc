"""What the ranks of a checkpoint test do: real gloo groups, ragged shards; each rank leaves its findings as JSON."""

from __future__ import annotations

import json
import math
import random
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
import torch.multiprocessing

from vitds.checkpoint import Saved, Saver, newest_checkpoint, write_bandwidth
from vitds.checkpoint.format import EMA, MODEL, OPTIMIZER
from vitds.layout import Shard

TRAINING_STATE: dict[str, Any] = {
    "step": 12,
    "position": 2**40,
    "images_seen": 2**39,
    "skipped": [[3, 5]],
    "evaluated": 0,
    "losses": [2.5, 1 / 3],
    "stream": {"seed": 0, "global_batch": 16, "rates": {"head": [0.1, 0.03, False]}},
    "schedule": {"type": "constant", "total_steps": 50, "params": {"warmup_steps": 0, "cooldown_steps": 5}},
    "optimizer": {"type": "ModifiedAdafactor", "params": {"lr": 0.1}},
    "counters": {"optimizer": {"updates": 12}, "loss_scale": {}},
    "evaluation": {"eval/top1": 0.25},
    "world_size": 3,
    "zero_stage": 2,
    "versions": {"vitds": "0.1.0"},
    "note": "ü",
}
EXTRA: dict[str, str | bytes] = {"config.json": '{"model_type": "vit"}', "README.md": "# ViT ü".encode()}
SMALL_FILES = {"file_bytes": 300, "min_file_bytes": 100, "bucket_bytes": 24}
WEIGHTS = {
    "blocks.2.w": (10, 3),
    "blocks.10.w": (4, 4),
    "pos_embed": (1, 5, 7),
    "head.bias": (13,),
    "logit_scale": (),
    "empty": (0, 4),
}


def logical() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Whole weights and state; with bits that a detour over another dtype would lose."""
    generator = torch.Generator().manual_seed(0)
    weights, state = {}, {}
    for name, shape in WEIGHTS.items():
        weights[name] = torch.randn(shape, generator=generator)
        state[f"{name}.exp_avg"] = torch.randn(shape, generator=generator).bfloat16()
        state[f"{name}.step"] = torch.tensor(2**53 + 1)
    weights["head.bias"][:3] = torch.tensor([float("nan"), -0.0, float("inf")])
    state["blocks.2.w.exp_avg_sq_row"] = torch.randn(10, generator=generator)
    state["blocks.2.w.mask"] = torch.rand(10, 3, generator=generator) > 0.5
    return weights, state


def shards(tensors: dict[str, torch.Tensor], rank: int, world: int) -> list[Shard]:
    """Rank's live part of each tensor: cut at random places, often in mid-row, often empty or absent."""
    group = torch_dist.group.WORLD if world > 1 else None
    found = []
    for name, tensor in tensors.items():
        flat, shape = tensor.reshape(-1).clone(), tuple(tensor.shape)
        if name.endswith((".step", "_row")):
            found.append(Shard(name, shape, flat, group=group, replicated=True))
            continue
        draw = random.Random(f"{name} {world}")
        cuts = [0, *sorted(draw.randint(0, flat.numel()) for _ in range(world - 1)), flat.numel()]
        part = flat[cuts[rank] : cuts[rank + 1]].clone()
        if part.numel() or rank % 2 == 0:
            found.append(Shard(name, shape, part, cuts[rank], group))
    random.Random(rank).shuffle(found)
    return found


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def zeroed(given: list[Shard]) -> list[Shard]:
    return [Shard(s.name, s.shape, torch.zeros_like(s.data), s.start, s.group, s.replicated) for s in given]


def save(
    directory: Path,
    step: int,
    weights: list[Shard],
    state: list[Shard],
    training_state: dict[str, Any],
    extra_files: dict[str, str | bytes],
    *,
    background: bool = True,
    **sizes: int,
) -> Saved:
    """Begin and commit at once."""
    saver = Saver(directory, background=background, **{**SMALL_FILES, **sizes})
    saver.begin(step, {MODEL: weights, OPTIMIZER: state}, {**training_state, "step": step}, extra_files)
    return saver.commit()


def load_and_save_again(source: Path, target: Path, rank: int, world: int) -> bool:
    """Load at this world size, compare bit for bit with what the rank should hold, save what was loaded."""
    weights, state = (shards(tensors, rank, world) for tensors in logical())
    checkpoint = newest_checkpoint(source)
    assert checkpoint is not None
    got_weights, got_state = zeroed(weights), zeroed(state)
    checkpoint.read_into({MODEL: got_weights, OPTIMIZER: got_state})
    equal = all(bits(a.data) == bits(b.data) for a, b in zip(weights + state, got_weights + got_state, strict=True))
    save(target, checkpoint.step, got_weights, got_state, checkpoint.training_state, EXTRA)
    return equal and checkpoint.training_state == TRAINING_STATE


def failure_of(action: Any) -> str:
    try:
        action()
    except RuntimeError as error:
        return str(error)
    return ""


def first_world(rank: int, world: int, root: Path, weights: list[Shard], state: list[Shard]) -> dict[str, Any]:
    """Save, and fail to save in every way; what the rank was told."""
    found: dict[str, Any] = {}
    save(root / "first", 12, weights, state, TRAINING_STATE, EXTRA)
    save(root / "synchronous", 12, weights, state, TRAINING_STATE, EXTRA, background=False)
    for absent in range(world):
        cut = [Shard("cut", (9,), torch.ones(3), 3 * rank, torch_dist.group.WORLD)] if rank != absent else []
        found[f"hole {absent}"] = failure_of(partial(save, root / "hole", 1, weights + cut, state, {}, {}))
    twice = weights + [s for s in weights if rank == 2 and s.name == "blocks.2.w"]
    found["twice"] = failure_of(lambda: save(root / "hole", 1, twice, state, {}, {}))
    blocked = root / "a file"
    if rank == 0:
        blocked.write_text("in the way of a directory")
    found["blocked"] = failure_of(lambda: save(blocked, 1, weights, state, {}, {}))
    found["not json"] = failure_of(lambda: save(root / "first", 13, weights, state, {"x": math.nan}, {}))
    large = [Shard("large", (3 * 40_000,), torch.full((40_000,), float(rank)), rank * 40_000, torch_dist.group.WORLD)]
    for full in range(world):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        for background in (True, False):
            found[f"full disk of rank {full}, {background}"] = failure_of(
                partial(
                    save, root / "first", 14, weights + large, state, {}, {}, background=background, bucket_bytes=2**14
                )
            )
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    own = root / ("first" if rank != 1 else "elsewhere")
    if rank == 1:
        (own / "step-000000015.tmp").mkdir(parents=True)
    found["not shared"] = failure_of(lambda: save(own, 15, weights, state, {}, {}))
    if rank == 1:
        found["left elsewhere"] = [path.name for path in own.iterdir()]
    found["not mounted"] = failure_of(lambda: save(own, 15, weights, state, {}, {}))
    found["two begun"] = two_begun(root / "two", weights, state)
    found["no bandwidth"] = failure_of(lambda: write_bandwidth(root / "two" if rank != 1 else blocked, 100))
    # Rank 1 is no writer: that it has no such directory hurts nobody.
    bandwidth = write_bandwidth(root / "two" if rank != 1 else blocked, 100_000, {0, 2})
    tensors, saver = {MODEL: weights, OPTIMIZER: state}, Saver(root / "two", **SMALL_FILES)
    share, rate = saver.share_and_speed(tensors, 50)
    assert share == saver.plan(tensors) > 0
    assert rate > 0
    found["bandwidth"] = bandwidth, len(list((root / "two").iterdir()))
    return found


def two_begun(directory: Path, weights: list[Shard], state: list[Shard]) -> Any:
    """A second save begins while the first is pending; between them the state moves, and so does the first's plan."""
    saver = Saver(directory, **SMALL_FILES)
    tensors = {MODEL: weights, OPTIMIZER: state, EMA: weights}
    assert not saver.pending
    assert not saver.busy
    assert saver.begin(1, tensors, {**TRAINING_STATE, "step": 1}, EXTRA) is None
    assert saver.pending
    for shard in weights:
        shard.data.add_(1)
    first = saver.begin(2, tensors, {**TRAINING_STATE, "step": 2}, EXTRA)
    assert first is not None
    assert saver.pending
    for shard in weights:
        shard.data.sub_(1)
    second = saver.commit()
    assert not saver.pending
    assert not saver.busy
    shares = saver.plan(tensors), saver.plan({MODEL: weights, OPTIMIZER: []})
    return first.path.name, second.path.name, first.bytes, second.background, second.note, shares


def work(rank: int, world: int, root: Path) -> None:
    """One rank of a world: the first world saves, every world loads what the first saved and saves it again."""
    join(rank, world, root)
    weights, state = (shards(tensors, rank, world) for tensors in logical())
    found: dict[str, Any] = {}
    if world == 3:
        found |= first_world(rank, world, root, weights, state)
    found["equal"] = load_and_save_again(root / "first", root / f"again-{world}", rank, world)
    leave(found, rank, world, root)


def join(rank: int, world: int, root: Path) -> None:
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo", init_method=f"file://{root}/store-{world}", rank=rank, world_size=world)


def leave(found: dict[str, Any], rank: int, world: int, root: Path) -> None:
    (root / f"found-{world}-{rank}.json").write_text(json.dumps(found))
    torch_dist.barrier()
    torch_dist.destroy_process_group()


def launch(world: int, root: Path, of_rank: Callable[[int, int, Path], None] = work) -> list[dict[str, Any]]:
    """Run `of_rank` on real processes; what each rank found."""
    ranks = torch.multiprocessing.start_processes(of_rank, (world, root), nprocs=world, join=False, start_method="fork")
    deadline = time.monotonic() + 90
    while not ranks.join(timeout=1):
        if time.monotonic() > deadline:
            for process in ranks.processes:
                process.kill()
            raise TimeoutError(f"a world of {world} hangs")
    return [json.loads((root / f"found-{world}-{rank}.json").read_text()) for rank in range(world)]


def small_checkpoint(directory: Path | None = None, step: int = 12, **sizes: int) -> Path:
    """A checkpoint written by a world of one."""
    weights, state = (shards(tensors, 0, 1) for tensors in logical())
    directory = directory or Path(tempfile.mkdtemp())
    return save(directory, step, weights, state, {**TRAINING_STATE, "step": step}, EXTRA, **sizes).path
