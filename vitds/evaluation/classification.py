"""Top-1, top-5 and loss over a held-out set, exact on uneven last batches and any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vitds import dist
from vitds.data import EvalLoader, to_model_range
from vitds.models.losses import LOSSES


@torch.no_grad()
def evaluate(
    engine: Any, loader: EvalLoader, loss: str, between: Callable[[], None], prefix: str = "eval"
) -> dict[str, float]:
    """Run the model over every image once. Collective; every rank returns the same figures.

    A prediction is right when the label at its place is positive, so several labels may be right (recipe of the paper,
    as for ReaL labels); images without any label count for nothing.

    Args:
        engine: called with images (B, 3, S, S) in [−1, 1]; its output has `logits` (B, C).
        loader: batches padded with `is_real` False, equally many on each rank.
        loss: name in LOSSES.
        between: called before each batch, equally often on every rank; may end the evaluation by raising on all.
        prefix: of the names of what is returned.

    Returns:
        eval/top1 and eval/top5 as fractions, eval/loss as the mean over images, eval/images.
    """
    engine.train(False)
    sums = torch.zeros(4, dtype=torch.float64, device=engine.device)
    try:
        for batch in loader:
            between()
            logits = engine(to_model_range(batch.images, engine.device)).logits.float()  # (B, C)
            labels = batch.labels.to(engine.device)
            positive = torch.nn.functional.one_hot(labels, logits.shape[1]) if labels.ndim == 1 else labels  # (B, C)
            counts = batch.is_real.to(engine.device) & (positive.sum(dim=1) > 0)
            if not counts.any():
                continue
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5)
            right = positive.gather(1, best)[counts] > 0
            sums += torch.stack([
                right[:, 0].sum(), right.any(dim=1).sum(), LOSSES[loss](logits[counts], labels[counts]) * counts.sum(), counts.sum(),
            ]).double()  # fmt: skip
    finally:
        engine.train(True)
    top1, top5, total_loss, images = dist.sum_over_ranks(sums).tolist()
    if images == 0:
        return {f"{prefix}/images": 0.0}
    return {
        f"{prefix}/top1": top1 / images,
        f"{prefix}/top5": top5 / images,
        f"{prefix}/loss": total_loss / images,
        f"{prefix}/images": images,
    }
