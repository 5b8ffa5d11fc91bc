"""Parameters with every kind of view, and ways to cut them into flats as ZeRO would."""

from __future__ import annotations

import functools
import random
from typing import Any

import torch

from vitds.layout import Flat, Fragment

D, HEADS, HEAD, MLP = 70, 2, 35, 67
SHAPES: dict[str, tuple[int, ...]] = {
    "qkv.weight": (3 * D, D), "qkv.bias": (3 * D,), "proj.weight": (D, D), "proj.bias": (D,),
    "fc1.weight": (MLP, D), "fc1.bias": (MLP,), "fc2.weight": (D, MLP), "square": (40, 40),
    "patch16": (36, 3, 16, 16), "patch32": (34, 2, 32, 32), "pos_embed": (1, 49, D), "probe": (1, 1, D),
    "batched": (2, 33, 3, 41, 2), "thin": (31, 90), "norm": (D,), "one": (1,),
    "head.weight": (101, D), "head.bias": (101,),
}  # fmt: skip
VIEWS = {"qkv.weight": (3, HEADS, HEAD, D), "qkv.bias": (3, HEADS, HEAD), "proj.weight": (D, HEADS, HEAD)}
SETTINGS = {
    name: {"weight_decay": 3.0 if name == "head.weight" else 0.3 if name.endswith("weight") else 0.0} for name in SHAPES
}
LR = 1e-2
LRS = [LR * (k / 4 if k < 4 else (4 / k) ** 0.5) for k in range(20)]
"""As a warmup runs: the first update has rate 0 and still counts."""


def initial(seed: int = 0) -> dict[str, torch.Tensor]:
    """First values of the size of a ViT's."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in SHAPES.items()}


@functools.cache
def gradients(steps: int = 20, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Gradients whose size differs along every axis, so that a factor in the wrong place shows. Not to be changed."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(steps):
        grads = {}
        for name, shape in SHAPES.items():
            view = VIEWS.get(name, shape)
            g = torch.randn(view, generator=generator) * 1e-3
            for axis, size in enumerate(view):
                g *= torch.logspace(-0.5, 0.5, size).roll(axis).view([-1 if a == axis else 1 for a in range(len(view))])
            grads[name] = g.view(shape)
        out.append(grads)
    return out


def groups_of(world_size: int, layout: str, seed: int) -> list[list[list[Fragment]]]:
    """Random flats: per flat, per rank, the ordered fragments.

    "contiguous" cuts the concatenation of a flat's parameters into equal parts (ZeRO-1, 2), anywhere in a matrix;
    "sliced" cuts each parameter into equal parts, which leaves ranks without any of the small ones (ZeRO-3);
    "random" cuts each parameter at random points. All leave padding between and behind the fragments.
    """
    rng = random.Random(seed)
    names = list(SHAPES)
    rng.shuffle(names)
    flats: list[list[list[Fragment]]] = []
    for part in (names[:6], names[6:10], names[10:]):
        ranks: list[list[Fragment]] = [[] for _ in range(world_size)]
        position, total_of_part = 0, sum(torch.Size(SHAPES[n]).numel() for n in part)
        per_rank = -(-total_of_part // world_size) + 2
        offsets = [rng.randrange(3) for _ in range(world_size)]
        for name in part:
            total = torch.Size(SHAPES[name]).numel()
            if layout == "contiguous":
                bounds = [min(max(rank * per_rank - position, 0), total) for rank in range(world_size)] + [total]
            elif layout == "sliced":
                bounds = [min(rank * -(-total // world_size), total) for rank in range(world_size)] + [total]
            else:
                bounds = [0, *sorted(rng.randint(0, total) for _ in range(world_size - 1)), total]
            position += total
            for rank in range(world_size):
                start, numel = bounds[rank], bounds[rank + 1] - bounds[rank]
                view = VIEWS.get(name, SHAPES[name])
                ranks[rank].append(Fragment(name, SHAPES[name], view, start, numel, offsets[rank]))
                offsets[rank] += numel + (rng.randrange(4) if layout != "contiguous" else 0)
        flats.append(ranks)
    return flats


def build(ranks: list[list[Fragment]], rank: int, values: dict[str, torch.Tensor], group: Any = None) -> Flat:
    """One rank's flat filled with the values; what lies between the fragments is not a number."""
    fragments = ranks[rank]
    size = max([f.offset + f.numel for f in fragments], default=0) + 3
    tensor = torch.full((size,), float("nan"))
    flat = Flat(tensor, tuple(fragments), group)
    fill(flat, tensor, values)
    return flat


def fill(flat: Flat, tensor: torch.Tensor, values: dict[str, torch.Tensor]) -> None:
    """Copy this rank's part of whole tensors to where the fragments lie."""
    for f in flat.fragments:
        f.of(tensor).copy_(values[f.name].reshape(-1)[f.start : f.start + f.numel])


def param_groups(flats: list[Flat]) -> list[dict[str, Any]]:
    """One group per flat; decay must be one per group, so tests that cut use the same for all."""
    return [{"params": [flat.tensor], "name": f"flat {i}"} for i, flat in enumerate(flats)]
