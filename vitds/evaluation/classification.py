"""Top-1, top-5 and loss over a held-out set, exact on uneven last batches and any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from vitds import dist
from vitds.data import EvalLoader, to_model_range
from vitds.models.losses import LOSSES

TOPS = (1, 5)


class Witness(Protocol):
    """Looks at every image that counts, as it is evaluated."""

    def add(self, logits: torch.Tensor, best: torch.Tensor, positive: torch.Tensor) -> None:
        """One batch's images, without those that count for nothing.

        Args:
            logits: fp32 (B, C).
            best: int64 (B, K), the classes of the K largest logits, best first.
            positive: (B, C), above 0 at the image's labels.
        """


@torch.no_grad()
def evaluate(
    engine: Any,
    loader: EvalLoader,
    loss: str,
    between: Callable[[], None] = lambda: None,
    prefix: str = "eval",
    tops: Sequence[int] = TOPS,
    witnesses: Sequence[Witness] = (),
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
        tops: for each k, the share of images with a right label among the k best.
        witnesses: are shown this rank's images.

    Returns:
        eval/top<k> as fractions, eval/loss as the mean over images, eval/images.
    """
    engine.train(False)
    sums = torch.zeros(len(tops) + 2, dtype=torch.float64, device=engine.device)
    try:
        for batch in loader:
            between()
            logits = engine(to_model_range(batch.images, engine.device)).logits.float()  # (B, C)
            labels = batch.labels.to(engine.device)
            positive = torch.nn.functional.one_hot(labels, logits.shape[1]) if labels.ndim == 1 else labels  # (B, C)
            counts = batch.is_real.to(engine.device) & (positive.sum(dim=1) > 0)
            if not counts.any():
                continue
            logits, labels, positive = logits[counts], labels[counts], positive[counts]
            best = logits.topk(min(max(tops), logits.shape[1]), dim=1).indices  # (B, K)
            right = positive.gather(1, best) > 0
            found = [right[:, :k].any(dim=1).sum() for k in tops]
            sums += torch.stack([*found, LOSSES[loss](logits, labels) * len(logits), counts.sum()]).double()
            for witness in witnesses:
                witness.add(logits, best, positive)
    finally:
        engine.train(True)
    *within, total_loss, images = dist.sum_over_ranks(sums).tolist()
    if images == 0:
        return {f"{prefix}/images": 0.0}
    return {
        **{f"{prefix}/top{k}": number / images for k, number in zip(tops, within, strict=True)},
        f"{prefix}/loss": total_loss / images,
        f"{prefix}/images": images,
    }
