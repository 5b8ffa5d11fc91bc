"""Sizes of DeepSpeed's buckets fitted to the model, where the run file gives none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vitds.optim.groups import FLAT_ELEMENTS

PARTS = 32
LEAST, MOST = 2**22, 2**26


def fit_buckets(zero: dict[str, Any], sizes: Sequence[int]) -> None:
    """Write the sizes that `zero_optimization` leaves open into it, in elements.

    DeepSpeed's own default of 500 million takes 1 GB in bf16 three times over, for a model of any size. A bucket here is a
    thirty-second of the model, so that all but the last hide behind the backward pass; not less than 4 million, which
    are 8 MB and take longer to send than to start; room for the largest parameter, as a larger one goes alone; and not
    more than a flat. At stage 3 small parameters do not stay whole: DeepSpeed gathers each of them by itself after
    the update (396 collectives in ViT-G/14), but with their neighbours where the forward pass needs them.

    Args:
        sizes: elements of every parameter.
    """
    total = sum(sizes)
    bucket = min(total, max(LEAST, min(MOST, max(*sizes, total // PARTS))))
    bucket += bucket % 2  # DeepSpeed's flats are aligned to two elements
    stage = zero.get("stage", 0)
    if stage > 0:
        zero.setdefault("reduce_bucket_size", bucket)
    if stage in (1, 2):
        zero.setdefault("allgather_bucket_size", bucket)
    if stage == 3:
        zero.setdefault("sub_group_size", FLAT_ELEMENTS)
        zero.setdefault("stage3_prefetch_bucket_size", bucket)
        zero.setdefault("stage3_param_persistence_threshold", 0)
