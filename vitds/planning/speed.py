"""How long an optimizer step takes, by kind of work, before anything runs: a roofline, uncalibrated on any GPU.

A micro batch of B images of T tokens through L blocks of width D and MLP M, e bytes a number:

    products       2 FLOPs a multiply-add (vitds.models.flops_per_image), twice more in backward, at PRODUCTS of the peak, and TAIL
                   seconds for each: its start, and the last wave of tiles that does not fill the device; backward once for inputs,
                   down to the lowest trained block, and once for weights that are trained
    attention      4·T²·D a block and image forward, 2.5 times that backward (it computes the scores again), at a part of the peak
    elementwise    what norms, sums, GELU and biases read and write, at STREAM of the bandwidth; in numbers a token and block:
                       forward    norms 4D, sums 6D, GELU 2M                    compiled: 9D and 2M
                       backward   norms 6D, sums of gradients 6D, biases 5D + M, GELU 3M, q, k, v put together 6D
                                                                                compiled: 19D and 3M
    recomputed     what blocks do again: "full" a forward pass, "selective" its elementwise part (at ZeRO-3 its products too)
    gradients      copies into buckets and sums, by ZeRO stage, at STREAM
    optimizer      gradient, state and masters read and written once, the norm, the clipping, the new weights, at STREAM
    communication  vitds.planning.scaling

Kernels that a host launches one after the other are no faster than LAUNCH each. Not in it: data loading, evaluation,
checkpoints, clocks that fall under load.
"""

from __future__ import annotations

from dataclasses import dataclass

from vitds.models import flops_per_image
from vitds.models.activation_checkpointing import per_block
from vitds.planning.communication import communication
from vitds.planning.devices import Device
from vitds.planning.optimizer_state import state_bytes
from vitds.planning.scaling import Machine, seconds, waited_for
from vitds.planning.shares import flat_shares, master_bytes, sum_bytes
from vitds.planning.workload import Workload

PRODUCTS = 0.70
"""Part of the peak that a large bf16 product reaches. Assumed: unmeasured here."""
ATTENTION = {"long ago": 0.50, "hopper": 0.25}
"""Part of the peak of FlashAttention-2: 50 to 73 % on an A100 (arXiv 2307.08691), on an H100 35 % at most (arXiv 2407.08608); less
there at 256 tokens, by how much is assumed."""
HOPPER = 4e14
"""FLOP/s above which a device is one of those on which attention does not keep pace."""
STREAM = 0.80
"""Part of the bandwidth that passes over tensors reach. Assumed: unmeasured here."""
TAIL, LAUNCH = 8e-6, 5e-6
"""Seconds of a product beside its FLOPs, and of a launch by the host. Assumed: unmeasured here."""
KERNELS = {False: 70, True: 40}
"""Kernels of a block, forward and backward, eager and compiled. Counted on the operations, not on a device."""


@dataclass(frozen=True)
class StepTime:
    """One optimizer step of a rank."""

    parts: tuple[tuple[str, float], ...]
    """(what, seconds)."""
    images: int
    """Of all ranks."""
    flops: float
    """Model FLOPs of a rank: what is computed again is not in them."""
    peak_flops: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(time for _, time in self.parts)

    @property
    def images_per_second(self) -> float:
        """Of all ranks."""
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
        machine: the hosts; None: hosts of such devices with docs/scaling.md's other numbers.
        mfu: instead of products, attention, elementwise and launches: what one device reaches that recomputes nothing.
    """
    machine = machine or device.machine()
    model, peak = workload.model, device.peak_flops / (1 if workload.precision_bytes == 2 else 2)
    flops = flops_per_image(model) * workload.micro_batch
    forward, backward = _passes(workload, device, peak, flops)
    passes = 1 + workload.reached + workload.weights_trained
    if mfu is not None:
        whole = passes * flops / (peak * mfu)
        scale = whole / (sum(forward.values()) + sum(backward.values()))
        forward, backward = ({k: v * scale for k, v in part.items()} for part in (forward, backward))
    again = _again(workload, forward)
    micro = {kind: forward.get(kind, 0.0) + backward.get(kind, 0.0) for kind in backward}
    launched = KERNELS[workload.compiled] * model.depth * LAUNCH if device.kind == "cuda" and mfu is None else 0.0
    micro["recomputed"] = again
    micro["launches waited for"] = max(0.0, launched - sum(micro.values()))
    stream = device.bandwidth * STREAM
    micro["gradients"] = _gradient_bytes(workload) / stream
    count = workload.accumulation
    parts = {kind: count * time for kind, time in micro.items()}
    parts["optimizer"] = _optimizer_bytes(workload, ranks) / stream
    times = {"forward": 0.0, "backward": 0.0, "step": 0.0}
    for part in communication(workload.job, ranks, count):
        times[part.when] += seconds(part, machine)
    behind = sum(backward.values()) + again
    hides = {"forward": count * sum(forward.values()), "backward": behind * (1 if workload.job.stage < 2 else count)}
    parts["communication waited for"] = waited_for(times, hides, workload.job, machine)
    shown = tuple((kind, time) for kind, time in parts.items() if time)
    return StepTime(shown, workload.images * ranks, passes * flops * count, peak)


def _passes(workload: Workload, device: Device, peak: float, flops: float) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of one micro batch's forward and backward pass, by kind."""
    model, e, tokens = workload.model, workload.precision_bytes, workload.micro_batch * workload.tokens
    depth, width, mlp = model.depth, model.width, model.mlp_dim
    scores = 4.0 * workload.tokens * tokens * width * depth
    products = (flops - scores) / (peak * PRODUCTS)
    tail = 4 * depth * TAIL if device.kind == "cuda" else 0.0
    part = ATTENTION["hopper" if peak > HOPPER else "long ago"]
    stream = device.bandwidth * STREAM
    seen = max(scores / (peak * part), tokens * depth * 4 * e * width / stream)
    ahead, behind = (9 * width + 2 * mlp, 19 * width + 3 * mlp)
    if not workload.compiled:
        ahead, behind = (10 * width + 2 * mlp, 23 * width + 4 * mlp)
    moved = tokens * e * depth / stream
    return (
        {"products": products + tail, "attention": seen, "elementwise": ahead * moved},
        {
            "products": (workload.reached + workload.weights_trained) * (products + tail),
            "attention": workload.reached * 2.5 * seen,
            "elementwise": workload.reached * behind * moved,
        },
    )


def _again(workload: Workload, forward: dict[str, float]) -> float:
    """Seconds of what a micro batch's backward pass computes again."""
    policies = per_block(workload.policy, workload.model.depth)
    reached = policies[max(workload.lowest, 0) :]
    full, selective = (reached.count(name) / len(policies) for name in ("full", "selective"))
    whole = sum(forward.values())
    cheap = whole - forward["attention"] if workload.job.stage == 3 else forward["elementwise"]
    return full * whole + selective * cheap


def _gradient_bytes(workload: Workload) -> float:
    """Read and written of gradients, beside what the products that make them write, in one micro batch."""
    job, e, sums = workload.job, workload.precision_bytes, sum_bytes(workload.job)
    adding = 3 * e if workload.accumulation > 1 else 0
    last = 1 / workload.accumulation
    if job.stage == 0:
        return job.trained * (adding + last * 4 * e)
    if job.whole_gradients:
        return job.trained * (e + 8 + last * 16)
    bucket = 4 * e + e + 2 * sums + (2 * job.gradient_bytes if job.gradient_bytes != e else 0)
    return job.trained * (adding + last * bucket if job.stage == 1 else bucket)


def _optimizer_bytes(workload: Workload, ranks: int) -> float:
    """Read and written by the norm, the clipping, the update and the new weights."""
    job = workload.job
    share = sum(flat.share for flat in flat_shares(job, ranks))
    statistics = 4 if workload.optimizer == "ModifiedAdafactor" else 0
    master, sums = master_bytes(job), sum_bytes(job)
    each = 2 * sums + 2 * master + statistics + master + 2 * master + workload.precision_bytes
    return share * each + 2 * state_bytes(job, ranks)
