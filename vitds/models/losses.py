"""Classification losses, in fp32 (in fp64 of fp64 logits).

A loss takes logits (B, C) and labels: class numbers (B,), or a row per image (B, C) of target probabilities, which may
be soft (mixup) or multi-hot. It returns a scalar, the mean over the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def sigmoid_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """−Σ_c [ y·log σ(z) + (1−y)·log σ(−z) ]: SUM over classes, mean over the batch, so C times torch's mean."""
    logits = _at_least_fp32(logits)
    if labels.ndim == 1:
        targets = torch.zeros_like(logits).scatter_(1, labels[:, None], 1.0)  # (B, C)
    else:
        targets = labels.to(logits.dtype)
    # Not torch's binary_cross_entropy_with_logits: it forms z − log σ(z), which for z = −10 leaves 1 % of error in each
    # of the thousands of negative classes (11.355 instead of 11.3435 at the start of a JFT run).
    return -(targets * F.logsigmoid(logits) + (1 - targets) * F.logsigmoid(-logits)).sum(dim=1).mean()


def softmax_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """−Σ_c y·log softmax(z), mean over the batch."""
    logits = _at_least_fp32(logits)
    return F.cross_entropy(logits, labels if labels.ndim == 1 else labels.to(logits.dtype))


def _at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sigmoid": sigmoid_cross_entropy,
    "softmax": softmax_cross_entropy,
}
