"""Gradient, weight and update norms of single parameters, right under every ZeRO stage.

Taken where the numbers are whole and fp32: around the inner optimizer's own step, fragment by fragment, summed over the
ranks that share a parameter. Costs a host copy of this rank's masters, so it is done at an interval only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vitds import dist
from vitds.layout import Flat
from vitds.zero.engine import TrainingEngine


@dataclass
class Norms:
    """Sums of squares over one whole parameter, and its size."""

    gradient: float
    weight: float
    update: float
    numel: int


@contextmanager
def observed(engine: TrainingEngine, due: bool = True) -> Iterator[dict[str, Norms]]:
    """While open and if it is due, an optimizer step fills the yielded dict, parameter name → `Norms`, when the block is left. Collective.

    Gradients are as they were before clipping; the update is what was added to the master, decay included.
    """
    if not due:
        yield {}
        return
    flats = {id(flat.tensor): flat for flat in engine.partitions.flats}
    before: dict[int, torch.Tensor] = {}
    sums: dict[str, torch.Tensor] = {}
    totals = {f.name: f.total for flat in flats.values() for f in flat.fragments}

    def stepped(optimizer: torch.optim.Optimizer) -> Iterator[Flat]:
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None and id(tensor) in flats:
                    yield flats[id(tensor)]

    def look_before(optimizer: Any, *_: Any) -> None:
        for flat in stepped(optimizer):
            grad: Any = flat.tensor.grad
            before[id(flat.tensor)] = flat.tensor.detach().to("cpu", copy=True)
            for f in flat.fragments:
                sums[f.name] = torch.zeros(3, dtype=torch.float64)
                sums[f.name][0] = _square_sum(f.of(grad))

    def look_after(optimizer: Any, *_: Any) -> None:
        for flat in stepped(optimizer):
            old = before.pop(id(flat.tensor))
            for f in flat.fragments:
                new = f.of(flat.tensor.detach()).float()
                sums[f.name][1] = _square_sum(new)
                sums[f.name][2] = _square_sum(new - f.of(old).to(new.device).float())

    hooks = [
        engine.optimizer.register_step_pre_hook(look_before),
        engine.optimizer.register_step_post_hook(look_after),
    ]
    result: dict[str, Norms] = {}
    try:
        yield result
    finally:
        for hook in hooks:
            hook.remove()
    whole_here = {f.name for flat in flats.values() if flat.group is None for f in flat.fragments}
    table = torch.stack([
        sums.get(name, torch.zeros(3, dtype=torch.float64)) / (dist.world_size() if name in whole_here else 1) for name in totals
    ])  # fmt: skip
    table = dist.sum_over_ranks(table.to(engine.device)).cpu()
    clipped = engine.clipping_factor() ** 2
    for (name, total), (gradient, weight, update) in zip(totals.items(), table.tolist(), strict=True):
        result[name] = Norms(gradient * clipped, weight, update, total)


def _square_sum(values: torch.Tensor) -> float:
    return float(values.float().square().sum(dtype=torch.float64))
