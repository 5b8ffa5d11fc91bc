"""Bytes of what a forward pass keeps for its backward pass, by kind, and of what a backward pass needs beside it.

B images of T tokens (N patches, and one more with a [class] token), width D, MLP M, H heads, C classes, e bytes a number.
What a block keeps of a micro batch, in numbers of e bytes a token (vitds.models.layers has the products in this order):

    residual    D  its input         D  the sum after attention
    norms       D  of norm1          D  of norm2               and 2 × 4 bytes each: mean and 1/σ
    attention   3D q, k and v        D  its result             and 4·H bytes: the softmax's logarithm of sums
    mlp         M  of fc1            M  of GELU

so 8D + 2M. `full` keeps the input alone, `selective` the input and every product (attention's result and sums among them),
and the rest comes back for one block at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vitds.models.activation_checkpointing import per_block
from vitds.planning.workload import Workload

IMAGE = 3 * 4
"""Bytes of a pixel as the model takes it: three colours in fp32."""


@dataclass(frozen=True)
class Kept:
    """Bytes of one kind."""

    kind: str
    bytes: int


def block(workload: Workload, policy: str) -> list[Kept]:
    """What one block keeps for its backward pass.

    Args:
        policy: "none", "full" or "selective".
    """
    model, e = workload.model, workload.precision_bytes
    width, mlp, heads = model.width, model.mlp_dim, model.num_heads
    tokens = workload.micro_batch * workload.tokens
    if policy == "full":
        return [Kept("residual", tokens * width * e)]
    sums = 4 * heads
    if workload.device == "cpu" and e == 2:  # attention works on fp32 copies there (vitds.models.layers.attend)
        attention = 4 * (3 + 1) * width + sums + e * width
    else:
        attention = e * (3 + 1) * width + sums
    if policy == "selective":
        return [
            Kept("residual", tokens * e * width),
            Kept("attention", tokens * (attention + e * width)),
            Kept("mlp", tokens * e * (mlp + width)),
        ]
    return [
        Kept("residual", tokens * e * 2 * width),
        Kept("norms", tokens * (e * 2 * width + 4 * 4)),
        Kept("attention", tokens * attention),
        Kept("mlp", tokens * e * 2 * mlp),
    ]


def blocks(workload: Workload) -> dict[str, int]:
    """What all blocks keep, by kind."""
    found: dict[str, int] = {}
    for policy in per_block(workload.policy, workload.model.depth):
        for kept in block(workload, policy):
            found[kept.kind] = found.get(kept.kind, 0) + kept.bytes
    return found


def again(workload: Workload) -> int:
    """What comes back of a block that is computed again, while its backward pass runs."""
    policies = per_block(workload.policy, workload.model.depth)
    whole = sum(kept.bytes for kept in block(workload, "none"))
    return max(
        (whole - sum(kept.bytes for kept in block(workload, policy)) for policy in policies if policy != "none"),
        default=0,
    )


def passing(workload: Workload) -> int:
    """What a block's backward pass holds beside what was kept: gradients of activations on their way."""
    model, e = workload.model, workload.precision_bytes
    return workload.micro_batch * workload.tokens * e * (2 * model.width + 2 * model.mlp_dim)


def ends(workload: Workload) -> Iterator[Kept]:
    """What stands before and after the blocks: images and their patches, last norm, pooling, classifier and loss."""
    model, e, images = workload.model, workload.precision_bytes, workload.micro_batch
    width, tokens, classes = model.width, workload.tokens, model.num_classes
    pixels = images * model.image_size**2
    cut = images * model.num_patches * 3 * model.patch_size**2
    yield Kept("images", pixels * IMAGE)
    yield Kept("patches", cut * e)
    yield Kept("norms", images * tokens * (2 * e * width + 8))  # the last block's result and its norm
    if model.pool == "map":
        yield Kept("pool", images * (tokens * 2 * width * e + e * (6 * width + 2 * model.mlp_dim)))
    if classes:
        yield Kept("loss", images * classes * 4 * 6 + classes * width * (4 if e == 2 else 0))
