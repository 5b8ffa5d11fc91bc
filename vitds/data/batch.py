"""What a loader hands over."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass
class Batch:
    """One rank's micro-batch, or one batch of an evaluation."""

    images: torch.Tensor
    """uint8 (B, 3, S, S); with mixup float32 already in [-1, 1]."""
    labels: torch.Tensor
    """int64 (B,), or float32 (B, C): multi-hot, or mixed."""
    positions: list[int]
    """Positions in the training stream, or indices of the evaluation's images (-1: padding)."""
    is_real: torch.Tensor
    """bool (B,): False for what fills an evaluation's last batch and for images that could not be decoded."""

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, from which copies to the accelerator overlap with work."""
        return replace(
            self,
            images=self.images.pin_memory(),
            labels=self.labels.pin_memory(),
            is_real=self.is_real.pin_memory(),
        )


def to_model_range(images: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """float32 (B, 3, S, S) in [-1, 1] on `device`: uint8 becomes x/127.5 − 1, float passes."""
    images = images.to(device, non_blocking=True)
    return images if images.is_floating_point() else images.float().div_(127.5).sub_(1)
