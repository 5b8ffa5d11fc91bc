"""What the optimizers must compute: float64, one process, whole parameters, straight from the published equations.

Shares no code with vitds.optim. The momentum is rounded to bf16 as the equations say, so two implementations that agree
to 1e-7 may still round one element to different neighbours now and then, after which that element is off by part of a
bf16 step. `reference_run` therefore also says which elements came so close to a rounding boundary that either neighbour
is right; `errors` measures those apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, np.dtype[np.float64]]
Tensors = Mapping[str, torch.Tensor]

DOUBT = 1e-6
"""Relative arithmetic error granted to an fp32 implementation when a bf16 rounding is judged to be open."""


class Parameter:
    """One parameter and its state, in the shape of its view."""

    def __init__(self, value: torch.Tensor, view: Sequence[int]) -> None:
        self.theta: Array = value.detach().double().cpu().numpy().reshape(view).copy()
        self.m = np.zeros_like(self.theta)
        self.v = np.zeros_like(self.theta)
        self.row: Any = 0.0
        self.col: Any = 0.0
        self.doubtful = np.zeros(self.theta.shape, dtype=bool)

    def momentum(self, decay: float, weight: float, new: Array) -> Array:
        """m ← decay·m + weight·new; returned unrounded, stored as bf16."""
        m = decay * self.m + weight * new
        spacing = np.exp2(np.floor(np.log2(np.maximum(np.abs(m), 1e-300))) - 7)
        from_boundary = np.abs(np.abs(m) / spacing % 1 - 0.5) * spacing
        self.doubtful |= from_boundary < DOUBT * (np.abs(decay * self.m) + np.abs(weight * new))
        self.m = torch.from_numpy(m).to(torch.bfloat16).double().numpy()
        return m


def adafactor(
    p: Parameter, g: Array, t: int, *, beta1: float = 0.9, beta2_cap: float = 0.999, decay_rate: float = 0.8,
    eps: float = 1e-30, min_dim_size_to_factor: int = 32, clipping_threshold: float | None = None,
) -> Array:  # fmt: skip
    """The paper's modified Adafactor; axes by np.argsort of the sizes, as in optax."""
    beta2 = min(beta2_cap, 1 - t**-decay_rate)
    s = g * g + eps
    order = np.argsort(g.shape, kind="stable")
    if g.ndim >= 2 and g.shape[order[-2]] >= min_dim_size_to_factor:
        d1, d0 = int(order[-2]), int(order[-1])
        p.row = beta2 * p.row + (1 - beta2) * s.mean(axis=d0)
        p.col = beta2 * p.col + (1 - beta2) * s.mean(axis=d1)
        d1_in_row = d1 - 1 if d1 > d0 else d1
        row_factor = (p.row / p.row.mean(axis=d1_in_row, keepdims=True)) ** -0.5
        update = g * np.expand_dims(row_factor, d0) * np.expand_dims(p.col**-0.5, d1)
    else:
        p.v = beta2 * p.v + (1 - beta2) * s
        update = g * p.v**-0.5
    if clipping_threshold is not None:
        update = update / max(1.0, math.sqrt(float((update * update).mean())) / clipping_threshold)
    return p.momentum(beta1, 1 - beta1, update)


def adam(p: Parameter, g: Array, t: int, *, betas: Sequence[float] = (0.9, 0.999), eps: float = 1e-8) -> Array:
    """Adam with bias correction."""
    m = p.momentum(betas[0], 1 - betas[0], g)
    p.v = betas[1] * p.v + (1 - betas[1]) * g * g
    return (m / (1 - betas[0] ** t)) / (np.sqrt(p.v / (1 - betas[1] ** t)) + eps)


def sgd(p: Parameter, g: Array, t: int, *, momentum: float = 0.9) -> Array:
    """Heavy ball."""
    return p.momentum(momentum, 1.0, g)


UPDATES: dict[str, Callable[..., Array]] = {
    "ModifiedAdafactor": adafactor,
    "HalfPrecisionMomentumAdam": adam,
    "HalfPrecisionMomentumSGD": sgd,
}


@dataclass
class Run:
    """Final values and open roundings, per parameter in logical shape."""

    values: dict[str, torch.Tensor]
    doubtful: dict[str, torch.Tensor]


def full_run(
    name: str, params: Tensors, views: Mapping[str, Sequence[int]], grads: Sequence[Tensors],
    settings: Mapping[str, Mapping[str, float]], clip: float = 0.0, lrs: Sequence[float] = (), **hyper: Any,
) -> Run:  # fmt: skip
    """Steps every parameter through all gradients.

    Args:
        name: the optimizer.
        params: initial values.
        views: shape in which each is factored; absent: its own.
        grads: per step, parameter name -> averaged gradient before clipping.
        settings: per parameter, {"weight_decay": …, "lr_mult": …}; absent: 0 and 1.
        clip: bound on the global norm, DeepSpeed's way: g / max(1, (norm + 1e-6)/clip); 0: none.
        lrs: learning rate of each step.
        hyper: the optimizer's other parameters.
    """
    state = {n: Parameter(value, views.get(n, value.shape)) for n, value in params.items()}
    for k, (step_grads, lr) in enumerate(zip(grads, lrs, strict=True)):
        gs = {n: step_grads[n].detach().double().cpu().numpy() for n in params}
        norm = math.sqrt(sum(float((g * g).sum()) for g in gs.values()))
        divisor = max(1.0, (norm + 1e-6) / clip) if clip else 1.0
        for n, p in state.items():
            group = settings.get(n, {})
            update = UPDATES[name](p, gs[n].reshape(p.theta.shape) / divisor, k + 1, **hyper)
            rate = lr * group.get("lr_mult", 1.0)
            p.theta = p.theta - rate * (update + group.get("weight_decay", 0.0) * p.theta)
    return Run(
        {n: torch.from_numpy(p.theta).reshape(params[n].shape) for n, p in state.items()},
        {n: torch.from_numpy(p.doubtful).reshape(params[n].shape) for n, p in state.items()},
    )


def reference_run(
    name: str, params: Tensors, views: Mapping[str, Sequence[int]], grads: Sequence[Tensors],
    settings: Mapping[str, Mapping[str, float]], clip: float = 0.0, lrs: Sequence[float] = (), **hyper: Any,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The final values of `full_run`, float64."""
    return full_run(name, params, views, grads, settings, clip, lrs, **hyper).values


@dataclass
class Error:
    """Largest deviation of an element, relative to how far it moved (or to the RMS movement, where that is larger)."""

    decided: float
    """Over the elements whose bf16 roundings were all clear: what an exact fp32 implementation keeps near 1e-6."""
    doubtful: float
    """Over the others, which may be off by bf16 steps of the momentum."""


def errors(actual: Tensors, initial: Tensors, reference: Run) -> dict[str, Error]:
    """How far each parameter is from the reference, relative to how far the reference moved it."""
    found = {}
    for name, wanted in reference.values.items():
        moved = (wanted - initial[name].double().cpu()).abs()
        scale = moved.clamp(min=max(float(moved.square().mean().sqrt()), 1e-30))
        off = (actual[name].detach().double().cpu() - wanted).abs() / scale
        off = torch.nan_to_num(off, nan=math.inf)
        open_ = reference.doubtful[name]
        found[name] = Error(
            float(torch.where(open_, 0.0, off).max()) if off.numel() else 0.0,
            float(torch.where(open_, off, 0.0).max()) if off.numel() else 0.0,
        )
    return found
