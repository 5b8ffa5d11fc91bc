"""How long an optimizer step takes, by kind of work, before anything runs: a roofline with named constants, none of them measured here.

Matrix products run at a part of the device's peak, attention at another, everything else moves bytes at a part of its
bandwidth; what is computed again counts again; communication is vitds.planning.scaling's.
"""

from __future__ import annotations

from dataclasses import dataclass

from vitds.models import flops_per_image
from vitds.models.activation_checkpointing import per_block
from vitds.planning.communication import communication
from vitds.planning.devices import Device
from vitds.planning.optimizer_state import state_bytes
from vitds.planning.scaling import Machine, seconds
from vitds.planning.workload import Workload

PRODUCTS = 0.75
"""Part of the peak that large bf16 products reach. Unmeasured here."""
ATTENTION_FORWARD, ATTENTION_BACKWARD = 0.40, 0.35
"""Part of the peak of fused attention at 256 tokens and heads of about 100. Unmeasured here."""
STREAM = 0.80
"""Part of the bandwidth that passes over tensors reach. Unmeasured here."""
EAGER_PASSES, COMPILED_PASSES = 46, 24
"""Numbers of a width that a block's norms, sums, GELU and biases read and write for a token, forward and backward. Estimated."""


@dataclass(frozen=True)
class StepTime:
    """One optimizer step of a rank."""

    parts: tuple[tuple[str, float], ...]
    """(what, seconds)."""
    images: int
    """Of all ranks."""
    ranks: int
    flops: float
    """Model FLOPs of a rank."""
    peak_flops: float

    @property
    def seconds(self) -> float:
        return sum(time for _, time in self.parts)

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs over the peak's, waiting included."""
        return self.flops / self.seconds / self.peak_flops


def step_time(
    workload: Workload, ranks: int, device: Device, machine: Machine | None = None, mfu: float | None = None
) -> StepTime:
    """The forecast.

    Args:
        machine: the hosts; None: hosts of such devices with docs/scaling.md's defaults.
        mfu: instead of the roofline, what one device alone reaches without recomputing anything.
    """
    model, images = workload.model, workload.images
    machine = machine or device.machine()
    forward = flops_per_image(model) * images
    peak = device.peak_flops / (1 if workload.precision_bytes == 2 else 2)
    tokens = workload.tokens
    attention = 4.0 * tokens**2 * model.width * model.depth * images
    again = sum(policy != "none" for policy in per_block(workload.policy, model.depth)) / model.depth
    stream = device.bandwidth * STREAM
    states = 4 * (workload.job.trained / (ranks if workload.job.stage else 1)) * 4 + 2 * state_bytes(
        workload.job, ranks
    )
    if mfu is not None:
        base = 3 * forward / (peak * mfu)
        parts = [("compute", base), ("recompute", again * base / 3)]
    else:
        products = (forward - attention) / (peak * PRODUCTS)
        passes = COMPILED_PASSES if workload.compiled else EAGER_PASSES
        other = passes * model.width * tokens * images * model.depth * workload.precision_bytes / stream
        seen = attention / (peak * ATTENTION_FORWARD)
        parts = [
            ("matmul", 3 * products),
            ("attention", seen + 2.5 * attention / (peak * ATTENTION_BACKWARD)),
            ("elementwise", other),
            ("recompute", again * (products + seen + other / 3)),
        ]
    computing = sum(time for _, time in parts)
    sent = sum(seconds(part, machine) for part in communication(workload.job, ranks, workload.accumulation))
    hides = workload.job.zero.get("overlap_comm", workload.job.stage == 3)
    waited = sent - min(machine.overlap * sent, computing) if hides else sent
    parts += [("optimizer", states / stream), ("communication waited for", waited)]
    return StepTime(tuple(parts), images * ranks, ranks, 3 * forward, peak)
