"""What a loader hands over, and how it lies in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Batch:
    """One rank's micro-batch, or one batch of an evaluation."""

    images: torch.Tensor
    """uint8 (B, 3, S, S); with mixup float32 already in [-1, 1]. In memory the channels come last."""
    labels: torch.Tensor
    """int64 (B,), or float32 (B, C): multi-hot, or mixed."""
    positions: list[int]
    """Positions in the training stream, or indices of the evaluation's images (-1: padding)."""
    is_real: torch.Tensor
    """bool (B,): False for what fills an evaluation's last batch and for images that could not be decoded."""


@dataclass(frozen=True)
class Layout:
    """The tensors of a batch in one piece of memory, by which it is shared between processes and copied as one.

    Args:
        size: B, the number of images.
        image_size: S.
        classes: C of labels (B, C); None for labels (B,).
        mixed: float32 images.
    """

    size: int
    image_size: int
    classes: int | None
    mixed: bool

    @property
    def nbytes(self) -> int:
        return sum(self._parts)

    @property
    def _parts(self) -> tuple[int, int, int]:
        """Bytes of labels, images and is_real, in this order, so that each lies where its type wants it."""
        label = 8 if self.classes is None else 4 * self.classes
        image = 3 * self.image_size**2 * (4 if self.mixed else 1)
        return self.size * label, self.size * image, self.size

    def batch(self, memory: torch.Tensor, positions: list[int]) -> Batch:
        """The batch that lies in `memory`, uint8 (nbytes,), on whatever device; nothing is copied."""
        labels, images, is_real = memory.split(self._parts)
        edge = self.image_size
        pixels = images.view(torch.float32 if self.mixed else torch.uint8).view(self.size, edge, edge, 3)
        return Batch(
            images=pixels.permute(0, 3, 1, 2),
            labels=labels.view(torch.int64) if self.classes is None else labels.view(torch.float32).view(self.size, -1),
            positions=positions,
            is_real=is_real.view(torch.bool),
        )


def to_model_range(images: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """float32 (B, 3, S, S) in [-1, 1] on `device`: uint8 becomes x/127.5 − 1, float passes."""
    images = images.to(device, non_blocking=True)
    if images.is_floating_point():
        return images
    # By a tensor on the device: by a Python number CUDA multiplies with its inverse, which in the last bit is not what the
    # saved image processor does.
    return images.float().div_(torch.full((), 127.5, device=images.device)).sub_(1)
