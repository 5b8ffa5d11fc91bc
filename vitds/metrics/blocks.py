"""The parts of the model that per-block diagnostics speak of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol


def group_by_block(name: str) -> str:
    """The block a parameter belongs to: "blocks.3.attn.qkv.weight" -> "blocks.3", "attn_pool.latent" -> "attn_pool"."""
    words = name.split(".")
    return ".".join(words[:2] if words[0] == "blocks" else words[:1])


class Norms(Protocol):
    """Sums of squares over one whole parameter (vitds.zero.observe)."""

    gradient: float
    weight: float
    update: float
    numel: int


def block_norms(norms: Mapping[str, Norms]) -> dict[str, float]:
    """Metrics of a diagnostic step: per block the gradient norm, the parameter norm and the RMS of the update.

    Args:
        norms: parameter name -> its sums; empty on other steps.
    """
    sums: dict[str, list[float]] = {}
    for name, norm in norms.items():
        of_block = sums.setdefault(group_by_block(name), [0.0, 0.0, 0.0, 0.0])
        for i, value in enumerate((norm.gradient, norm.weight, norm.update, norm.numel)):
            of_block[i] += value
    row = {}
    for block, (gradient, weight, update, numel) in sums.items():
        row[f"train/grad_norm/{block}"] = math.sqrt(gradient)
        row[f"train/param_norm/{block}"] = math.sqrt(weight)
        row[f"train/update_rms/{block}"] = math.sqrt(update / numel)
    return row
