"""A forecast of the step time on many GPUs: compute, what ranks send (vitds.planning.communication), and what of it is waited for.

A step of a micro batches takes

    T = a·m·3F/(peak·mfu)  +  W_forward  +  W_backward  +  W_step

m images a GPU and micro batch, F floating-point operations of one image's forward pass; a backward pass costs two forward
passes. `mfu` is what one GPU reaches with nobody to wait for, so recomputed activations, kernels and memory are in it.
W is communication that is waited for. Behind compute of a pass hides at most the part `overlap` of it, and at most as much
as the pass takes; without `overlap_comm` nothing hides, and what happens after the last backward never does:

    W_pass = t − min(overlap·t, compute of the pass)          W_step = t

A collective of `calls` calls over n ranks on h hosts of g takes t = calls·(latency of its hops) + bytes/bandwidth:
- Bytes are what a rank sends in a ring (`Traffic.wire`). Inside a host they go at `intra`. Past one host NCCL runs one ring for
  each GPU of a host, so that all network cards work: a ring leaves a host once, hence 1/g of a rank's bytes crosses each of
  the g cards, and the slower of the two rules: max(bytes/intra, bytes/(g·inter)).
- Hops: an all-reduce goes up and down a tree, 2·(⌈log2 g⌉ inside, ⌈log2 h⌉ between hosts), a reduce up only (Sanders, Speck and
  Träff, 2009, "Two-tree algorithms for full bandwidth broadcast, reduction and scan": a pair of trees has the ring's
  bandwidth). All-gather and reduce-scatter are rings: g − 1 hops inside, h − 1 between hosts.

Not in it: the optimizer's own time, memory (whether a cell fits), data loading, evaluation and checkpoints, a GPU's lower
efficiency on smaller micro batches, stragglers, congested or tapered networks, NCCL's choice of protocol. Micro batches of a
step are taken together, so what one of them cannot hide another may.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vitds.planning.communication import communication
from vitds.planning.job import Job, Traffic

HYBRID = "hybrid"


@dataclass(frozen=True)
class Machine:
    """The hardware, with one H100 host's numbers as defaults; see docs/scaling.md for where they come from."""

    gpus_per_host: int = 8
    peak_flops: float = 989e12
    """Dense FLOP/s of one GPU in the training precision."""
    mfu: float = 0.5
    """Part of the peak that one GPU alone reaches, in model FLOPs."""
    intra: float = 450e9
    """Bytes a second that a GPU sends to others of its host."""
    inter: float = 50e9
    """Bytes a second that a GPU sends to other hosts: its share of the host's network cards."""
    latency: float = 10e-6
    """Seconds of a hop between hosts."""
    intra_latency: float = 2e-6
    """Seconds of a hop inside a host."""
    overlap: float = 0.9
    """Part of the communication that can hide behind compute where `overlap_comm` is set."""


@dataclass(frozen=True)
class Forecast:
    """One cell of the table. Seconds of one optimizer step."""

    gpus: int
    stage: str
    """"1", "2", "3", "3 hpZ" or "hybrid"."""
    own: bool
    """Whether it is the run file's own setting."""
    micro_batch: int = 0
    accumulation: int = 0
    compute: float = math.nan
    communication: float = math.nan
    waited: float = math.nan
    sent: float = math.nan
    """Bytes that each GPU sends."""
    images_per_second: float = math.nan
    efficiency: float = math.nan
    """Images a second and GPU, over those of the same stage on one full host."""
    impossible: str = ""
    """Why there is no forecast."""
    note: str = ""

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return self.compute + self.waited


@dataclass(frozen=True)
class Batches:
    """The run file's batch sizes; the global one is kept on any number of GPUs."""

    total: int
    micro: int
    least_gpus: int = 1
    most_gpus: int | None = None

    def on(self, gpus: int) -> tuple[int, int]:
        """(micro batch, accumulation): the run file's micro batch, or the largest below it that divides."""
        share = self.total // gpus
        micro = next(size for size in range(min(self.micro, share), 0, -1) if share % size == 0)
        return micro, share // micro


def forecast(
    job: Job, batches: Batches, flops_per_image: float, machine: Machine, numbers: Sequence[int], stages: Sequence[int]
) -> list[Forecast]:
    """The table: every number of GPUs with every stage, stage 3 with hpZ over a host, and hybrid sharding.

    Args:
        flops_per_image: of one forward pass.
        numbers: of GPUs.
        stages: ZeRO stages to tell of.
    """
    rows = []
    for gpus in numbers:
        for stage, label, variant in variants(job, machine, gpus, stages):
            own = label == own_label(job)
            reason = why_not(gpus, batches, machine, variant)
            if reason:
                rows.append(Forecast(gpus, label, own, impossible=reason))
                continue
            row = _cell(variant, label, own, batches, flops_per_image, machine, gpus)
            host = machine.gpus_per_host
            # hpZ and hybrid sharding are, inside one host, ZeRO-3
            alone = job.at_stage(stage, zero_hpz_partition_size=1) if stage == 3 else variant
            if batches.total % host == 0:
                one = _cell(alone, str(stage), own, batches, flops_per_image, machine, host)
                per_gpu = one.images_per_second / host
                row = Forecast(**{**vars(row), "efficiency": row.images_per_second / gpus / per_gpu})
            rows.append(row)
    return rows


def own_label(job: Job) -> str:
    """The row of the table that is the run file's own setting."""
    return "3 hpZ" if job.hpz > 1 else str(job.stage)


def variants(job: Job, machine: Machine, gpus: int, stages: Sequence[int]) -> list[tuple[int, str, Job]]:
    """(stage, row's name, job) of every way to train on so many GPUs."""
    found = [(stage, str(stage), job.at_stage(stage, zero_hpz_partition_size=1)) for stage in stages]
    width = job.hpz if job.hpz > 1 else machine.gpus_per_host
    if 3 in stages and gpus > width:
        found.append((3, "3 hpZ", job.at_stage(3, zero_hpz_partition_size=width)))
    if 3 in stages and gpus > machine.gpus_per_host:
        found.append((3, HYBRID, job.at_stage(3, zero_hpz_partition_size=1)))
    return found


def why_not(gpus: int, batches: Batches, machine: Machine, job: Job) -> str:
    """Why a cell cannot be, with what would make it possible; empty where it can."""
    if batches.total % gpus:
        low = batches.total // gpus * gpus
        near = " or ".join(str(size) for size in (low, low + gpus) if size)
        return f"train_batch_size {batches.total} does not divide over {gpus} GPUs; {near} would"
    if gpus < batches.least_gpus:
        return f"vitds.cluster.min_gpus is {batches.least_gpus}"
    if batches.most_gpus is not None and gpus > batches.most_gpus:
        return f"vitds.cluster.max_gpus is {batches.most_gpus}"
    if gpus > machine.gpus_per_host and gpus % machine.gpus_per_host:
        return f"{gpus} GPUs are not whole hosts of {machine.gpus_per_host}"
    if gpus % job.hpz:
        return f"zero_hpz_partition_size {job.hpz} does not divide {gpus} GPUs"
    return ""


def traffic(job: Job, label: str, machine: Machine, gpus: int, micro_batches: int) -> list[Traffic]:
    """What is sent in a step, by a row of the table.

    Hybrid sharding (weights, gradients and optimizer state cut over one host, the hosts alike; FSDP's HYBRID_SHARD and
    MiCS, arXiv 2205.00119) is not to be had in DeepSpeed 0.19.8. Its row is ZeRO-3 inside each host, whose gradient shards
    are then added up over the hosts once a step.
    """
    if label != HYBRID:
        return communication(job, gpus, micro_batches)
    host = machine.gpus_per_host
    shard = math.ceil(job.trained / host) * job.gradient_bytes
    return [*communication(job, host, micro_batches), Traffic("gradients", "all_reduce", shard, 1, gpus // host)]


def seconds(part: Traffic, machine: Machine, across: bool = False) -> float:
    """How long one kind of message takes.

    Args:
        across: every rank is on another host, as between the copies of hybrid sharding.
    """
    local = 1 if across else min(part.ranks, machine.gpus_per_host)
    hosts = math.ceil(part.ranks / local)
    hops = (local - 1, hosts - 1)
    if part.kind in ("all_reduce", "reduce"):
        ways = 2 if part.kind == "all_reduce" else 1
        hops = (ways * math.ceil(math.log2(local)), ways * math.ceil(math.log2(hosts)))
    latency = hops[0] * machine.intra_latency + hops[1] * machine.latency
    inside = part.wire / machine.intra if local > 1 else 0.0
    outside = part.wire / (local * machine.inter) if hosts > 1 else 0.0
    return part.calls * latency + max(inside, outside)


def waited_for(times: Mapping[str, float], passes: Mapping[str, float], job: Job, machine: Machine) -> float:
    """W: seconds of communication that no compute hides.

    Args:
        times: of communication, in forward, backward and step.
        passes: seconds of compute that it can hide behind in forward and in backward.
    """
    hidden = machine.overlap if job.zero.get("overlap_comm", job.stage == 3) else 0.0
    return times["step"] + sum(times[name] - min(hidden * times[name], passes[name]) for name in passes)


def _cell(
    job: Job, label: str, own: bool, batches: Batches, flops_per_image: float, machine: Machine, gpus: int
) -> Forecast:
    micro, accumulation = batches.on(gpus)
    parts = traffic(job, label, machine, gpus, accumulation)
    forward = accumulation * micro * flops_per_image / (machine.peak_flops * machine.mfu)
    # ZeRO-1 reduces once, behind the last micro batch's backward at most
    passes = {"forward": forward, "backward": 2 * forward / (accumulation if job.stage < 2 else 1)}
    times = {"forward": 0.0, "backward": 0.0, "step": 0.0}
    for part in parts:
        across = label == HYBRID and part is parts[-1] and gpus > machine.gpus_per_host
        times[part.when] += seconds(part, machine, across)
    waited = waited_for(times, passes, job, machine)
    step = 3 * forward + waited
    note = "" if micro == batches.micro else f"micro batch {micro}: {batches.micro} does not divide"
    return Forecast(
        gpus, label, own, micro, accumulation, 3 * forward, sum(times.values()), waited,
        sum(part.wire for part in parts), batches.total / step, note=note,
    )  # fmt: skip
