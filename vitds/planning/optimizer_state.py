"""Bytes of optimizer state on a rank, asked of the optimizer itself: ours are bound to flats without memory (the meta device),
others step a few elements here, and what they keep for each is counted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

from vitds.layout import Flat, Fragment
from vitds.optim import DEEPSPEED_PARAMS, OPTIMIZERS, LayoutOptimizer, ModifiedAdafactor, constructor_params
from vitds.optim.base import CPU_CHUNK
from vitds.planning.job import Job
from vitds.planning.shares import flat_shares, master_bytes

_ELEMENTS = 64
FUSED = ("Adam", "AdamW", "Lion")
"""DeepSpeed builds these itself, as one kernel that needs nothing beside its state."""


def state_bytes(job: Job, ranks: int) -> int:
    """What rank 0, which nothing pads, keeps from step to step."""
    name, params = job.optimizer["type"], constructor_params(dict(job.optimizer.get("params", {})))
    cls = OPTIMIZERS.get(name)
    if cls is None or not issubclass(cls, LayoutOptimizer):
        held = sum(flat.share for flat in flat_shares(job, ranks))
        return round(_bytes_per_element(name, json.dumps(params, default=str)) * held)
    flats = list(_flats(job, ranks))
    optimizer = cls([{"params": [flat.tensor for flat in flats]}], **params)
    optimizer.bind(flats)
    return optimizer.state_bytes()


def scratch_bytes(job: Job, ranks: int, device: str) -> int:
    """The most that an update holds beside state and gradient, by torch's operators (our own kernels on CUDA need less)."""
    name, sizes = job.optimizer["type"], job.sizes
    share = max((flat.share for flat in flat_shares(job, ranks)), default=0)
    cls = OPTIMIZERS.get(name)
    if cls is not None and issubclass(cls, LayoutOptimizer):
        largest = max((sizes[parameter] for parameter in job.names), default=0)
        chunk = CPU_CHUNK if device == "cpu" else max(CPU_CHUNK, largest)
        if issubclass(cls, ModifiedAdafactor):  # it goes from parameter to parameter, what is not factored in one piece
            rest = sum(sizes[parameter] for parameter in job.names if len(job.views[parameter]) < 2)
            chunk = min(chunk, max(largest, rest))
        return 2 * 4 * min(share, chunk)
    if name in FUSED and not job.optimizer.get("params", {}).get("torch_adam"):
        return 0
    together = device != "cpu" and (job.stage == 0 or job.whole_gradients)  # torch takes all tensors of a step at once
    return 2 * 4 * (sum(flat.share for flat in flat_shares(job, ranks)) if together else share)


def _flats(job: Job, ranks: int) -> Iterator[Flat]:
    """Rank 0's flats, on the meta device."""
    dtype = torch.float32 if master_bytes(job) == 4 else torch.bfloat16
    group = object() if ranks > 1 and job.stage else None
    for flat in flat_shares(job, ranks):
        fragments, offset = [], 0
        for name, held in zip(flat.names, flat.held, strict=True):
            shape, view = tuple(job.shapes[name]), tuple(job.views[name])
            fragments.append(Fragment(name, shape, view, 0, held, offset))
            offset += held
        yield Flat(torch.empty(flat.share, dtype=dtype, device="meta"), tuple(fragments), group)


@lru_cache(maxsize=64)
def _bytes_per_element(name: str, params: str) -> float:
    """What an elementwise optimizer keeps for each element; scalars do not count."""
    given: dict[str, Any] = json.loads(params)
    classes = {"Adam": torch.optim.AdamW, "AdamW": torch.optim.AdamW}
    if name == "Lion":
        return 4.0
    cls: Any = OPTIMIZERS.get(name) or classes.get(name) or getattr(torch.optim, name)
    own = {key: value for key, value in given.items() if key not in DEEPSPEED_PARAMS}
    parameter = torch.nn.Parameter(torch.zeros(_ELEMENTS))
    parameter.grad = torch.ones(_ELEMENTS)
    optimizer = cls([parameter], **own)
    optimizer.step()
    tensors = [value for value in optimizer.state[parameter].values() if torch.is_tensor(value)]
    return sum(t.nbytes for t in tensors if t.numel() == _ELEMENTS) / _ELEMENTS
