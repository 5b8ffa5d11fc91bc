"""What a block keeps of its forward pass, and what it computes again in the backward pass."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vitds.errors import UserError

ALLOWED = "none, full, every:N (every N-th block), selective"
aten = torch.ops.aten
# Not aten.mm: where a linear layer is a product followed by an in-place sum (torch on strided input; DeepSpeed's linear
# under ZeRO-3), that sum would change the kept product, and the second pass would add the bias twice, unnoticed.
# Every product of ours carries its bias (addmm), so without ZeRO-3 all are kept; with it, attention alone.
KEPT = {
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}


def per_block(policy: str, depth: int) -> list[str]:
    """What each block does: "none", "full" or "selective".

    Raises:
        UserError: an unknown policy.
    """
    if policy in ("none", "full", "selective"):
        return [policy] * depth
    if match := re.fullmatch(r"every:([1-9]\d*)", policy):
        return ["none" if i % int(match[1]) else "full" for i in range(depth)]
    raise UserError(f"activation_checkpointing: {policy!r} is not known; allowed: {ALLOWED}")


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, policy: str) -> torch.Tensor:
    """`function(x)`, keeping for the backward pass x alone ("full"), or x and the outputs of matrix products and
    attention ("selective": norms, GELU and sums are computed again). Values and gradients do not change.

    The random state is not kept: nothing in the model draws random numbers.
    """
    arguments: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if policy == "selective":
        arguments["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    return checkpoint(function, x, **arguments)
