"""Features of a set of images: what the classifier is given (`pre_logits`), by any engine, each image once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from vitds.data import EvalLoader, to_model_range


class Features(NamedTuple):
    """Of some images of this rank."""

    features: torch.Tensor
    """float32 (b, D)."""
    labels: torch.Tensor
    """int64 (b,), or multi-hot (b, C)."""
    indices: torch.Tensor
    """int64 (b,): of the images in their source."""


def features(engine: Any, loader: EvalLoader, between: Callable[[], None] = lambda: None) -> Iterator[Features]:
    """Batch by batch, this rank's share of all images; what pads a batch or cannot be decoded is left out.

    Collective while there are batches: every rank is to take as many (a batch may be empty), and does.

    Args:
        engine: called with images (B, 3, S, S) in [−1, 1] and `features_only`; its output's `logits` are (B, D).
        loader: batches padded with `is_real` False, equally many on each rank.
        between: called before each batch on every rank; may end it by raising on all.
    """
    engine.train(False)
    try:
        for batch in loader:
            between()
            with torch.no_grad():
                found = engine(to_model_range(batch.images, engine.device), features_only=True).logits.float()  # (B, D)
            real = batch.is_real.to(engine.device)
            indices = torch.tensor(batch.positions)[batch.is_real.cpu()]
            yield Features(found[real], batch.labels.to(engine.device)[real], indices)
    finally:
        engine.train(True)


def collected(engine: Any, loader: EvalLoader, between: Callable[[], None] = lambda: None) -> Features:
    """All of this rank's `features` at once, in host memory: 4·D bytes an image."""
    parts = [Features(*(tensor.cpu() for tensor in part)) for part in features(engine, loader, between)]
    return Features(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
