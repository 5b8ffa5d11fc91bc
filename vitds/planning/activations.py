"""Bytes of what a forward pass keeps for its backward pass, by kind, and of what either holds beside it for a while.

B images of N patches and T tokens (one more with a [class] token), width D, MLP M, H heads, C classes, e bytes a number.
A block keeps, in numbers of e bytes a token (vitds.models.layers has the operations in this order):

    residual    D  its input         D  the sum after attention
    norms       D  of norm1          D  of norm2               and 2 × 4 bytes each: mean and 1/σ
    attention   3D q, k and v        D  its result             and 4·H bytes: the softmax's logarithm of sums
    mlp         M  of fc1            M  of GELU

so 8D + 2M, compiled or not: of the compiled block other tensors are kept, equally large ones. Recomputed, it keeps

    full        D  its input
    selective   D  its input, 3D + D of attention and M of fc1, D of proj, and not compiled D of fc2, whose results
                torch keeps because they are products;
                at ZeRO-3, whose products are DeepSpeed's own, D and D of attention's result alone

and the rest of it is back while its backward pass runs. Below everything that is trained nothing is kept. A frozen block above keeps
as much here as a trained one; in truth without the inputs of its products, which only their weights' gradients need. On CPUs in 16 bits attention works on fp32 copies of q, k and v.
"""

from __future__ import annotations

from dataclasses import dataclass

from vitds.models.activation_checkpointing import per_block
from vitds.planning.workload import Workload


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro batch."""

    blocks: list[dict[str, int]]
    """What each block keeps, by kind."""
    backward: list[tuple[int, int]]
    """What its backward pass brings back and holds beside what it keeps, in its MLP and in its attention; there it may be
    less than nothing, for the MLP's tensors are gone."""
    ends: dict[str, int]
    """Before and after the blocks: images, patches, norm, pooling, classifier, loss."""
    loss: int
    """What the loss's, the classifier's or the pooling's own passes hold beside what is kept."""

    def kept(self, blocks: int) -> dict[str, int]:
        """What the first so many blocks keep, by kind."""
        found: dict[str, int] = {}
        for block in self.blocks[:blocks]:
            for kind, size in block.items():
                found[kind] = found.get(kind, 0) + size
        return found


def activations(workload: Workload) -> Activations:
    """Those of one micro batch."""
    policies: list[str | None] = list(per_block(workload.policy, workload.model.depth))
    policies[: max(workload.lowest, 0)] = [None] * max(workload.lowest, 0)  # no backward pass comes here
    held = {policy: _backward(workload, policy) if policy else (0, 0) for policy in set(policies)}
    kept = {policy: _block(workload, policy) if policy else {} for policy in set(policies)}
    return Activations([kept[p] for p in policies], [held[p] for p in policies], _ends(workload), _head(workload))


def evaluation(workload: Workload) -> int:
    """The most that a forward pass holds that keeps nothing: one block's MLP or attention, or the logits."""
    model, e, tokens = workload.model, workload.precision_bytes, workload.micro_batch * workload.tokens
    images = workload.micro_batch * model.image_size**2 * 12
    mlp = 3 * model.width + 2 * model.mlp_dim  # the block's input, the sum, its norm
    attention = 6 * model.width + (4 * 4 * model.width // e if _fp32_attention(workload) else 0)
    logits = workload.micro_batch * model.num_classes * (4 * 3 + 8) + _classifier_copy(workload)
    return images + max(tokens * e * max(mlp, attention), tokens * e * 3 * model.width + logits)


def _block(workload: Workload, policy: str) -> dict[str, int]:
    """What a block keeps, by kind."""
    model, e = workload.model, workload.precision_bytes
    width, mlp, tokens = model.width, model.mlp_dim, workload.micro_batch * workload.tokens
    if policy == "full":
        return {"residual": tokens * e * width}
    sums = 4 * model.num_heads
    wide = _fp32_attention(workload)
    if policy == "selective":
        result = (4 if wide else e) * width + sums
        if workload.job.stage == 3:  # DeepSpeed's own linear there is none of the products that are kept
            return {"residual": tokens * e * width, "attention": tokens * result}
        unneeded = 1 if workload.compiled else 2
        return {
            "residual": tokens * e * width,
            "attention": tokens * (3 * e * width + result),
            "mlp": tokens * e * mlp,
            "not needed": tokens * e * unneeded * width,
        }
    return {
        "residual": tokens * e * 2 * width,
        "norms": tokens * (e * 2 * width + 4 * 4),
        "attention": tokens * ((4 * 4 + e if wide else 4 * e) * width + sums),
        "mlp": tokens * e * 2 * mlp,
    }


def _backward(workload: Workload, policy: str) -> tuple[int, int]:
    """What a block's backward pass brings back and holds at most, beside what the block keeps, in MLP and attention.

    The gradient of its result all along. In the MLP that of GELU's result as well; in attention, when the MLP's tensors are
    gone, those of its result and of q, k and v.
    """
    model, e = workload.model, workload.precision_bytes
    width, mlp, tokens = model.width, model.mlp_dim, workload.micro_batch * workload.tokens
    stored = sum(_block(workload, policy).values())
    if policy == "selective" and not workload.compiled and workload.job.stage < 3:
        stored -= tokens * e * width  # fc2's result is not asked for again, and stays
    back = sum(_block(workload, "none").values()) - stored
    gone = e * (2 * width + 2 * mlp)  # norm2's input and result, and the MLP's
    wide = _fp32_attention(workload)
    attention = (e + 4 * (4 if wide else e)) * width - gone - (e * width if wide else 0)
    return back + tokens * e * (width + mlp), back + tokens * attention


def _ends(workload: Workload) -> dict[str, int]:
    model, e, images = workload.model, workload.precision_bytes, workload.micro_batch
    width, tokens, classes, mlp = model.width, images * workload.tokens, model.num_classes, model.mlp_dim
    norm = tokens * (e * width + 8)  # its input, and two numbers a token
    pool = 0
    if model.pool == "map":
        norm += tokens * e * width  # which keys and values are made of
        pool = tokens * 2 * width * (4 if _fp32_attention(workload) else e)
        pool += images * (e * (5 * width + 2 * mlp) + 4 * model.num_heads)
    elif model.pool == "token" and e == 4:
        norm += tokens * e * width  # a view of one token keeps all of them
    names = workload.job.names
    if all(name.startswith("head.") for name in names):
        norm = pool = 0  # what the classifier keeps is its own input
    ends = {
        "images": images * model.image_size**2 * 12,
        "patches": images * model.num_patches * 3 * model.patch_size**2 * e
        if "patch_embed.proj.weight" in names
        else 0,
        "norm": norm,
        "pool": pool,
    }
    if classes:
        ends["classifier"] = _classifier_copy(workload) + images * width * 4
        ends["loss"] = images * classes * 4 * _loss_rows(workload)[0]
    return ends


def _head(workload: Workload) -> int:
    """What the passes after the blocks hold for a while, beside all that is kept: the loss, or behind it the classifier, or
    behind both the pooling."""
    model, e, images = workload.model, workload.precision_bytes, workload.micro_batch
    tokens, row = images * workload.tokens, images * model.num_classes * 4
    rows, more = _loss_rows(workload)
    copy = _classifier_copy(workload)
    classifier = row + copy - rows * row
    fields = (4 if _fp32_attention(workload) else e) if model.pool == "map" else e
    return max(more * row, classifier, tokens * fields * 2 * model.width - rows * row - copy)


def _classifier_copy(workload: Workload) -> int:
    """The classifier works in fp32: of 16-bit weights it makes a copy."""
    return workload.model.num_classes * (workload.model.width + 1) * 4 if workload.precision_bytes == 2 else 0


def _loss_rows(workload: Workload) -> tuple[int, int]:
    """fp32 numbers for every logit that the loss keeps, and holds for a while (vitds.models.losses; labels as class numbers)."""
    return (1, 1) if workload.model.loss == "sigmoid" else (1, 2)


def _fp32_attention(workload: Workload) -> bool:
    """On CPUs attention in 16 bits works on fp32 copies (vitds.models.layers.attend)."""
    return workload.device == "cpu" and workload.precision_bytes == 2
