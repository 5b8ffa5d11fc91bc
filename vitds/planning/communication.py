"""What ranks say to each other in one optimizer step: bytes by collective, worked out from the run file alone.

DeepSpeed 0.19.8's rules, each read in its sources and checked by a counted run (tests/planning/counted.py). Ψ is the
number of trained parameters, n the number of ranks:

    stage 0    gradients: all-reduce of Ψ, once a step
    stage 1    the same (under BF16_Optimizer of the flats, padding included, in pieces of a bucket); weights: all-gather of the flats after the update
    stage 2    gradients: all-reduce of Ψ, after every micro batch; weights: as stage 1
    stage 3    gradients: reduce-scatter of Ψ, after every micro batch; weights: all-gathers in forward and in backward
               (vitds.planning.gathers), and of the small persistent ones after the update

Stages 1 and 2 so send more than the ZeRO paper (arXiv 1910.02054, §7) says: its reduce-scatter is an all-reduce here, of
buckets in which slices for several owners lie together (`use_multi_rank_bucket_allreduce`; switched off, one reduce per owner).
Stage 2 does it again in every micro batch, because it keeps no whole gradient to add to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vitds.optim.factoring import factoring_of
from vitds.planning.gathers import Settings, gathers
from vitds.planning.job import Job, Traffic

NO_LIMIT = 2**63 - 1
ENGINE_BUCKET = 500_000_000
"""Elements (deepspeed/runtime/engine.py: MEMORY_OPT_ALLREDUCE_SIZE)."""


def communication(job: Job, ranks: int, micro_batches: int) -> list[Traffic]:
    """All that a rank has to do with the others in one optimizer step of a run under way; nothing for one rank alone.

    Not in it: the first steps of ZeRO-3, which learn the order of modules and gather more; evaluation and checkpoints; two
    flags a micro batch by which ranks agree to stop (over gloo, 2 bytes); the overflow flag of fp16 at stage 0.

    Args:
        ranks: GPUs; every one holds a share (no tensor or pipeline parallelism).
        micro_batches: gradient accumulation steps.
    """
    if ranks == 1:
        return []
    parts = _stage_3(job, ranks, micro_batches) if job.stage == 3 else _stages_0_to_2(job, ranks, micro_batches)
    flats = job.flats(ranks)
    moments = [_factors(job, flat) for flat in flats] if job.stage > 0 else []
    parts += [Traffic("second moments", "all_reduce", 4 * size, 1, ranks) for size in moments if size]
    if job.optimizer["params"].get("clipping_threshold") is not None and job.stage > 0 and any(moments):
        parts += [Traffic("second moments", "all_reduce", 4 * len(flat), 1, ranks) for flat in flats]
    # The mean loss, as the guard and the log want it, and under ZeRO with it the squared norm of the gradient.
    parts.append(Traffic("scalars", "all_reduce", 16 if job.stage > 0 else 8, 1, ranks))
    return parts


def totals(parts: Sequence[Traffic]) -> dict[str, int]:
    """Payload bytes by kind of collective."""
    kinds = {part.kind for part in parts}
    return {kind: sum(part.payload for part in parts if part.kind == kind) for kind in sorted(kinds)}


def _stages_0_to_2(job: Job, ranks: int, micro_batches: int) -> list[Traffic]:
    stage, gradients, sizes = job.stage, job.trained, job.sizes
    padded = [_padded(sum(sizes[name] for name in flat), 2 * ranks) for flat in job.flats(ranks)]
    times = micro_batches if stage == 2 else 1
    kind, when, bucket = "all_reduce", "backward", int(job.zero.get("reduce_bucket_size", 5e8))
    trained = [name for name in sizes if name in job.names]
    if stage == 0 or job.whole_gradients:
        pieces = [piece for size in padded for piece in _split(size, bucket)]
        tensors, when = (pieces if stage else [sizes[name] for name in trained]), "step"
        gradients, calls = sum(tensors), _engine_calls(tensors, bucket - 1 if stage else ENGINE_BUCKET)
    else:
        if stage == 1 and not job.zero.get("overlap_comm"):  # group after group, when all are there
            trained = [name for group in job.groups for name in group]
        else:  # each as soon as it is ready, the last layers' first
            trained.reverse()
        buckets = buckets_of(trained, sizes, bucket)
        calls = len(buckets)
        if job.zero.get("reduce_scatter", True) and not job.zero.get("use_multi_rank_bucket_allreduce", True):
            kind = "reduce"
        elif job.zero.get("reduce_scatter", True):
            places = _places(job, ranks)
            calls += sum(_pieces(*places[b[0]], bucket) - 1 for b in buckets if sizes[b[0]] > bucket)
    parts = [Traffic("gradients", kind, times * gradients * job.gradient_bytes, times * calls, ranks, when)]
    if stage > 0:
        parts += [Traffic("weights", "all_gather", size * job.weight_bytes, 1, ranks) for size in padded]
    if stage == 0 and not job.half and job.section.get("gradient_clipping", 0):
        parts.append(Traffic("scalars", "all_reduce", 4, 1, ranks))  # the norm, once more averaged
    return parts


def _stage_3(job: Job, ranks: int, micro_batches: int) -> list[Traffic]:
    sizes, zero = job.sizes, job.zero
    padded = {name: _padded(size, ranks) for name, size in sizes.items()}
    settings = Settings(
        int(zero.get("stage3_prefetch_bucket_size", 5e7)),
        int(zero.get("stage3_max_live_parameters", 1e9)),
        int(zero.get("stage3_max_reuse_distance", 1e9)),
    )
    persistent = persistent_of(job)
    parts, copied = list[Traffic](), set[str]()
    wide: dict[tuple[str, int], list[int]] = {}
    for batch in gathers(sizes, persistent, settings, job.policy, micro_batches):
        for gather in batch:
            # hpZ: once a weight was whole, a copy of it stays cut over the nearest ranks until the update makes it old.
            for near in (False, True):
                names = [name for name in gather.names if (job.hpz > 1 and name in copied) == near]
                if names:
                    entry = wide.setdefault(
                        ("forward" if gather.forward else "backward", job.hpz if near else ranks), [0, 0]
                    )
                    entry[0] += sum(padded[name] for name in names)
                    entry[1] += 1
            copied |= set(gather.names)
    for (when, group), (elements, calls) in sorted(wide.items(), reverse=True):
        parts.append(Traffic("weights", "all_gather", elements * job.weight_bytes, calls, group, when))
    kept = sum(padded[name] for name in persistent)
    if kept:
        parts.append(Traffic("weights", "all_gather", kept * job.weight_bytes, len(persistent), ranks))
    bucket = int(zero.get("reduce_bucket_size", 5e8))
    whole = not zero.get("reduce_scatter", True) and zero.get("contiguous_gradients", True)
    trained = [name for name in reversed(list(sizes)) if name in job.names]
    for names in buckets_of(trained, sizes, bucket):
        alike = whole and sum(sizes[name] for name in names) <= bucket
        elements = sum((sizes if alike else padded)[name] for name in names)
        payload = micro_batches * elements * job.gradient_bytes
        kind = "all_reduce" if alike else "reduce_scatter"
        parts.append(Traffic("gradients", kind, payload, micro_batches, ranks, "backward"))
    return parts


def persistent_of(job: Job) -> frozenset[str]:
    """Parameters small enough to stay whole, as long as all of them together are below their limit."""
    each = int(job.zero.get("stage3_param_persistence_threshold", 1e5))
    together, names, total = int(job.zero.get("stage3_model_persistence_threshold", NO_LIMIT)), set[str](), 0
    for name, size in job.sizes.items():
        if size <= each and total + size <= together:
            names.add(name)
            total += size
    return frozenset(names)


def _factors(job: Job, flat: Sequence[str]) -> int:
    """Elements of the row and column sums that ModifiedAdafactor adds up over the ranks for one flat."""
    if job.optimizer["type"] != "ModifiedAdafactor":
        return 0
    least = int(job.optimizer["params"].get("min_dim_size_to_factor", 32))
    axes = [factoring_of(tuple(job.views[name]), least) for name in flat]
    return sum(a.num_over_y + a.num_over_x for a in axes if a is not None)


def _places(job: Job, ranks: int) -> dict[str, tuple[int, int, int]]:
    """(start in its flat, elements, elements of the flat that a rank owns) of every trained parameter."""
    places, sizes = dict[str, tuple[int, int, int]](), job.sizes
    for flat in job.flats(ranks):
        share, start = _padded(sum(sizes[name] for name in flat), 2 * ranks) // ranks, 0
        for name in flat:
            places[name] = (start, sizes[name], share)
            start += sizes[name]
    return places


def _padded(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple


def buckets_of(names: Sequence[str], sizes: Mapping[str, int], bucket: int) -> list[list[str]]:
    """The gradients that are reduced together, taken in the order in which they are ready; a bucket that the next one would
    overflow goes off first."""
    found, filled = list[list[str]](), 0
    for name in names:
        if not found or filled + sizes[name] > bucket:
            found.append([])
            filled = 0
        found[-1].append(name)
        filled += sizes[name]
    return found


def _split(size: int, piece: int) -> list[int]:
    return [piece] * (size // piece) + ([size % piece] if size % piece else [])


def _engine_calls(sizes: Sequence[int], bucket: int) -> int:
    """Collectives where the engine itself reduces (stage 0, BF16_Optimizer): a bucket goes off once it is passed."""
    count = filled = 0
    for size in sizes:
        filled += size
        if filled > bucket:
            count, filled = count + 1, 0
    return count + (filled > 0)


def _pieces(start: int, size: int, share: int, bucket: int) -> int:
    """Collectives of one gradient larger than a bucket: it is cut where its owner changes, and sent when a bucket is passed.

    Args:
        start: where it begins in its flat.
        share: elements of the flat that a rank owns.
    """
    count, filled, position = 0, 0, start
    while position < start + size:
        end = min(start + size, (position // share + 1) * share)
        filled, position = filled + end - position, end
        if filled > bucket:
            count, filled = count + 1, 0
    return count + (filled > 0)
