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


def picture(batch: Batch, columns: int = 8) -> torch.Tensor:
    """The batch's images side by side, uint8 (3, H, W), `columns` in a row with 2 white pixels between."""
    images = batch.images
    if images.is_floating_point():
        images = images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    gap = 2
    grid = torch.full((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        grid[:, top : top + height, left : left + width] = image
    return grid
