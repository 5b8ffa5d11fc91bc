"""Weights of one resolution or set of classes in a model of another."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from vitds.errors import UserError


def resample_position_embedding(value: torch.Tensor, num_patches: int) -> torch.Tensor:
    """A position embedding for another number of patches, as the reference resamples it for fine-tuning.

    Bilinear with aligned corners (the paper's appendix D; `scipy.ndimage.zoom` of order 1 in the reference).

    Args:
        value: (1, N, D), fp32, of a square grid of patches.
        num_patches: of the new square grid.

    Returns:
        (1, num_patches, D).

    Raises:
        UserError: one of the two grids is not square.
    """
    old, new = math.isqrt(value.shape[1]), math.isqrt(num_patches)
    if old * old != value.shape[1] or new * new != num_patches:
        raise UserError(f"pos_embed: cannot be resampled from {value.shape[1]} to {num_patches} patches: not square")
    grid = value.reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, D, h, w)
    grid = functional.interpolate(grid, size=(new, new), mode="bilinear", align_corners=True)
    return grid.permute(0, 2, 3, 1).reshape(1, num_patches, -1)
