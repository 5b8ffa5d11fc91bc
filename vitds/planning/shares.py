"""Who holds what of the trained parameters: flats, and the part of each that a rank owns."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vitds.planning.job import BYTES, Job


@dataclass(frozen=True)
class FlatShare:
    """One tensor that the optimizer steps on rank 0, which owns the most of it."""

    names: tuple[str, ...]
    held: tuple[int, ...]
    """Elements that rank 0 owns of each of them."""
    elements: int
    """Of the whole flat, padded."""
    share: int
    """Of a rank's part, padded."""


def flat_shares(job: Job, ranks: int) -> list[FlatShare]:
    """The flats of a job on so many ranks; at stage 0 every parameter is one of its own, whole on every rank."""
    sizes = job.sizes
    found = []
    if job.stage == 0:
        return [FlatShare((n,), (sizes[n],), sizes[n], sizes[n]) for group in job.groups for n in group]
    for names in job.flats(ranks):
        each = [sizes[name] for name in names]
        if job.stage == 3:
            held = tuple(math.ceil(size / ranks) for size in each)
            found.append(FlatShare(names, held, sum(held) * ranks, sum(held)))
            continue
        share = math.ceil(sum(each) / (2 * ranks)) * 2
        left, cut = share, []
        for size in each:
            cut.append(min(size, left))
            left -= cut[-1]
        found.append(FlatShare(names, tuple(cut), share * ranks, share))
    return found


def sum_bytes(job: Job) -> int:
    """Bytes of a gradient where micro batches are added up: `data_types.grad_accum_dtype`, else the model's precision."""
    given = job.section.get("data_types", {}).get("grad_accum_dtype")
    return BYTES[str(given)] if given else job.weight_bytes


def master_bytes(job: Job) -> int:
    """Bytes of a master weight; 2 where the run file asks for masters in 16 bits."""
    for word in ("bf16", "fp16"):
        if job.section.get(word, {}).get("enabled") and job.section[word].get(f"{word}_master_weights_and_grads"):
            return 2
    return 4
