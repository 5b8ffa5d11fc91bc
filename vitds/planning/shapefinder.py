"""Which shapes fit a device under which optimizer, and how fast they would be: the paper's shape finder (§3.6, Figure 8) on paper.

"Scaling Vision Transformers" (arXiv 2106.04560) tried a grid of depths, widths and MLP widths on a TPUv3 core, and chose g and
G among what fits. Here the same grid is worked out, in one of two settings:

    ours     the trainer's engine on one device: vitds.planning.memory of a run file of this shape
    paper    data-parallel only, as there: fp32 weights (4 bytes), which are the masters, gradients, and the optimizer's state,
             8 bytes for Adam, 6 for Adam with half-precision momentum, 2 and a little for modified Adafactor; fp32
             activations. How much of gradients lives at once was XLA's to say: 4 bytes, 2, or 0 where each is used at once.
             XLA's recomputation is not known; the trainer's policies stand in for it.

A shape fits when `least` images a micro batch do, with the least recomputation that achieves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from vitds.errors import UserError
from vitds.models import Shape, flops_per_image, parameter_count
from vitds.models.shapes import variant_name
from vitds.planning.devices import Device
from vitds.planning.memory import memory
from vitds.planning.optimizer_state import state_bytes
from vitds.planning.speed import step_time
from vitds.planning.workload import Workload

OPTIMIZERS = {
    "original Adam": ("AdamW", {"torch_adam": True}),
    "half-precision Adam": ("HalfPrecisionMomentumAdam", {}),
    "modified Adafactor": ("ModifiedAdafactor", {}),
}
"""The paper's three, by what a user reads; type and params of the run file. Each needs less memory than the one before."""
POLICIES = ("none", "selective", "full")
"""Activation checkpointing, least recomputation first."""
GRADIENTS = {"fp32": 4, "bf16": 2, "none": 0}
"""Bytes a parameter of gradients that are alive at once, in the paper's setting."""


@dataclass(frozen=True)
class Limits:
    """What a shape has to fit into."""

    memory_bytes: int
    least: int = 8
    """Images of the smallest micro batch that is of use; the paper's G had 8 a core (32,768 over 4096)."""
    most: int = 128
    """Larger micro batches are not looked for."""
    images: int = 256
    """Of a device in an optimizer step: smaller micro batches accumulate."""


class Need(NamedTuple):
    """Bytes."""

    total: int
    """That the device must have."""
    peak: int
    """Of these, tensors at the worst moment: what torch.cuda.max_memory_allocated would say."""


@dataclass(frozen=True)
class Fit:
    """One shape under one optimizer."""

    optimizer: str
    micro_batch: int
    """The largest that fits; 0 where the shape does not."""
    policy: str
    """Activation checkpointing; where it does not fit, the last that was tried."""
    bytes: int
    """Needed with that micro batch; where it does not fit, with the least."""
    peak_bytes: int
    """Of these, tensors."""
    images_per_second: float = 0.0
    mfu: float = 0.0


@dataclass(frozen=True)
class Found:
    """One shape of the grid."""

    shape: Shape
    name: str
    """The family's name for it, or nothing."""
    row: str
    """How the MLP's width was asked for: "6144", "4x"."""
    parameters: int
    flops: float
    """Of an image's forward pass."""
    fits: dict[str, Fit]
    """By optimizer, in the order of OPTIMIZERS."""

    @property
    def first(self) -> str | None:
        """The first optimizer, in the paper's order, under which it fits."""
        return next((name for name, fit in self.fits.items() if fit.micro_batch), None)


def grid(
    depths: Sequence[int],
    widths: Sequence[int],
    mlps: Sequence[str],
    heads: Sequence[int],
    head_dims: Sequence[int],
    patch: int,
) -> Iterator[tuple[str, Shape]]:
    """Every shape with the text its MLP width was asked for by; heads that do not divide a width are left out.

    Args:
        mlps: "6144", or "4x" for four times the width.
        heads: numbers of heads; used where there are no `head_dims`.
        head_dims: widths of one head.

    Raises:
        UserError: no shape is left.
    """
    found = False
    for row in mlps:
        for width in widths:
            mlp = round(float(row[:-1]) * width) if row.endswith("x") else int(row)
            numbers = [width // size for size in head_dims if width % size == 0] if head_dims else heads
            for number in numbers:
                if width % number:
                    continue
                for depth in depths:
                    found = True
                    yield row, Shape(width, depth, mlp, number, patch)
    if not found:
        asked = f"--head-dim {_listed(head_dims)}" if head_dims else f"--heads {_listed(heads)}"
        raise UserError(f"{asked}: divides none of --widths {_listed(widths)}")


def find(row: str, base: Workload, device: Device, limits: Limits, needed: Callable[[Workload], Need]) -> Found:
    """What becomes of one shape.

    Args:
        row: how its MLP width was asked for.
        base: the shape's workload, with any optimizer, micro batch and policy.
        needed: what a workload needs of the device.
    """
    model = base.model
    fits = {}
    for label, (name, params) in OPTIMIZERS.items():
        fits[label] = _fit(label, base.with_optimizer(name, **params), device, limits, needed)
    name = variant_name(model.shape) or ""
    return Found(model.shape, name, row, parameter_count(model), flops_per_image(model), fits)


def ours(workload: Workload) -> Need:
    """Of a device that trains it alone, with the trainer's engine."""
    forecast = memory(workload, 1)
    return Need(forecast.total, forecast.peak)


def paper(gradient_bytes: int) -> Callable[[Workload], Need]:
    """The same in the paper's setting, of a workload in fp32 at stage 0.

    Args:
        gradient_bytes: a parameter, alive at once.
    """

    def needed(workload: Workload) -> Need:
        states = workload.job.trained * (4 + gradient_bytes) + state_bytes(workload.job, 1)
        forecast = memory(workload, 1)
        of_passes = [part for part in forecast.parts if part.kind == "activations"]
        total = states + max(sum(p.bytes for p in of_passes if moment in p.when) for moment in forecast.moments)
        return Need(total, total)

    return needed


def at(workload: Workload, micro_batch: int, limits: Limits) -> Workload:
    """The workload with this micro batch, accumulated to the images of a step."""
    return replace(workload, micro_batch=micro_batch, accumulation=max(1, -(-limits.images // micro_batch)))


def _fit(label: str, base: Workload, device: Device, limits: Limits, needed: Callable[[Workload], Need]) -> Fit:
    for policy in POLICIES:
        workload = base.with_policy(policy)
        need = needed(at(workload, limits.least, limits))
        if need.total <= limits.memory_bytes:
            break
    else:
        return Fit(label, 0, POLICIES[-1], *need)
    # ascending; sizes[low] fits, sizes[high] does not
    sizes = [limits.least, *range(limits.least // 8 * 8 + 8, limits.most + 1, 8)]
    low, high = 0, len(sizes)
    middle = high - 1  # the largest is the likeliest
    while high - low > 1:
        tried = needed(at(workload, sizes[middle], limits))
        if tried.total <= limits.memory_bytes:
            low, need = middle, tried
        else:
            high = middle
        middle = (low + high) // 2
    time = step_time(at(workload, sizes[low], limits), 1, device)
    return Fit(label, sizes[low], policy, *need, time.images_per_second, time.mfu)


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
