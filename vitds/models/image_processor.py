"""Images as the model wants them, with Pillow alone: the class behind preprocessor_config.json."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.utils import TensorType

from vitds.errors import UserError


class VitdsImageProcessor(BaseImageProcessor):
    """Shortest edge to `size`, centre crop to `crop_size`, values to [−1, 1]; what evaluation in training does.

    Args:
        crop_size: side of the result in pixels: 224 or {"height": 224, "width": 224}.
        size: shortest edge before the crop: 256 or {"shortest_edge": 256}; by default crop_size · 256/224.
        resample: Pillow's filter, by number or name; always antialiased.
        rescale_factor, image_mean, image_std: value = (pixel · rescale_factor − mean) / std per channel.

    Raises:
        UserError: a crop larger than the resized image, or an unknown filter.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 (declared so by transformers)

    def __init__(
        self,
        crop_size: int | dict[str, int] = 224,
        size: int | dict[str, int] | None = None,
        resample: int | str = Image.Resampling.BILINEAR,
        rescale_factor: float = 1 / 255,
        image_mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        image_std: tuple[float, ...] = (0.5, 0.5, 0.5),
        **others: Any,
    ) -> None:
        super().__init__(**others)
        crop = crop_size if isinstance(crop_size, int) else crop_size["height"]
        if size is None:
            size = round(crop * 256 / 224)
        edge = size if isinstance(size, int) else size["shortest_edge"]
        if edge < crop:
            raise UserError(f"size: a shortest edge of {edge} is too small for a crop of {crop}; at least {crop}")
        self.size = {"shortest_edge": edge}
        self.crop_size = {"height": crop, "width": crop}
        try:
            self.resample = int(Image.Resampling[resample.upper()] if isinstance(resample, str) else resample)
            Image.Resampling(self.resample)
        except (KeyError, ValueError):
            names = ", ".join(f.name.lower() for f in Image.Resampling)
            raise UserError(f"resample: {resample!r} is not known; allowed: {names}") from None
        self.rescale_factor = rescale_factor
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def preprocess(self, images: Any, return_tensors: str | TensorType | None = None) -> BatchFeature:
        """Pillow images, arrays or tensors, one or many, of any size and mode, to `pixel_values` (B, 3, S, S) fp32."""
        prepared = [self._prepared(image) for image in _each(images)]
        return BatchFeature(data={"pixel_values": prepared}, tensor_type=return_tensors)

    def _prepared(self, image: Any) -> np.ndarray:
        picture = rgb(as_picture(image))
        edge, crop = self.size["shortest_edge"], self.crop_size["height"]
        width, height = picture.size
        shorter = min(width, height)
        picture = picture.resize(
            (round(width * edge / shorter), round(height * edge / shorter)), Image.Resampling(self.resample)
        )
        left, top = (picture.width - crop) // 2, (picture.height - crop) // 2
        pixels = np.asarray(picture.crop((left, top, left + crop, top + crop)), dtype=np.float64)
        values = (pixels * self.rescale_factor - self.image_mean) / self.image_std  # (S, S, 3)
        return np.ascontiguousarray(values.transpose(2, 0, 1), dtype=np.float32)


def _each(images: Any) -> Iterator[Any]:
    if isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4:
        for image in images:
            yield from _each(image)
    else:
        yield images


def as_picture(image: Any) -> Image.Image:
    """A Pillow image of an array or tensor: (H, W), (H, W, C) or (C, H, W), of bytes or of fractions of one."""
    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image)
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if array.ndim == 2:
        array = array[..., None]
    return to_pil_image(array)


def rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode: 16-bit grey keeps its high byte, what is transparent shows white (as in training)."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it at 255.
        values = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
