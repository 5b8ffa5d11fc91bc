"""Bytes of what training keeps between steps, and of what a step's end needs beside it: weights to buckets, by ZeRO stage.

Ψ parameters of which a rank holds Ψ/n; e bytes a number of the model's precision, a of the sums over micro batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from vitds.optim.factoring import factoring_of
from vitds.planning.job import BYTES, Job
from vitds.planning.workload import Workload

ALWAYS = ("loss", "last block", "first block", "step", "evaluation")
PASSES = ("loss", "last block", "first block")


def states(workload: Workload, ranks: int) -> Iterator[tuple[str, str, int, tuple[str, ...]]]:
    """(kind, what, bytes, moments) of everything that is no activation."""
    job = workload.job
    e, stage, sizes = workload.precision_bytes, job.stage, job.sizes
    everything, trained = sum(sizes.values()), job.trained
    share = math.ceil(trained / ranks) if stage else trained
    sums = BYTES[str(job.section.get("data_types", {}).get("grad_accum_dtype") or ("bf16" if job.half else "fp32"))]
    yield "weights", "", (math.ceil(everything / ranks) if stage == 3 else everything) * e, ALWAYS
    if stage or job.half:
        yield "masters", "fp32", 4 * share, ALWAYS
    yield "optimizer state", workload.optimizer, state_bytes(job, ranks), ALWAYS
    if workload.ema:
        yield "average", "fp32", 4 * share, ALWAYS
    kept = trained if stage < 2 else share
    yield "gradients", "sums", kept * sums, (*PASSES[1:], "step") if workload.accumulation == 1 else (*PASSES, "step")
    largest = max(sum(sizes[name] for name in flat) for flat in job.flats(ranks))
    yield "gradients", "fp32, of the flat that is stepped", 4 * math.ceil(largest / (ranks if stage else 1)), ("step",)
    if stage:
        yield "buckets", "reduce", int(job.zero.get("reduce_bucket_size", 5e8)) * e, PASSES
    if stage == 3:
        live = int(job.zero.get("stage3_prefetch_bucket_size", 5e7)) * e
        yield "weights", "gathered", min(live, everything * e), PASSES


def state_bytes(job: Job, ranks: int) -> int:
    """Bytes of optimizer state on a rank: momentum in bf16; second moments by the optimizer; row and column sums whole."""
    name, params = str(job.optimizer["type"]), job.optimizer.get("params", {})
    share = 1 if job.stage == 0 else ranks
    trained = job.trained
    if name == "HalfPrecisionMomentumAdam":
        return math.ceil(trained / share) * 6
    if name == "HalfPrecisionMomentumSGD":
        return math.ceil(trained / share) * 2
    if name != "ModifiedAdafactor":
        return math.ceil(trained / share) * 8
    least, sizes, second = int(params.get("min_dim_size_to_factor", 32)), job.sizes, 0
    for parameter in job.names:
        axes = factoring_of(tuple(job.views[parameter]), least)
        second += math.ceil(sizes[parameter] / share) if axes is None else axes.num_over_y + axes.num_over_x
    return math.ceil(trained / share) * 2 + 4 * second
