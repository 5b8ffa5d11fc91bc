"""Images as the model wants them, with Pillow alone: the class behind preprocessor_config.json."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.utils import TensorType

from vitds.errors import UserError
from vitds.pictures import middle, shorter_edge_to, upright_rgb


class VitdsImageProcessor(BaseImageProcessor):
    """Resize, centre crop to `crop_size`, values to [−1, 1]; bit for bit what evaluation in training does.

    Args:
        crop_size: side of the result in pixels: 224 or {"height": 224, "width": 224}.
        size: before the crop. 256 or {"shortest_edge": 256}: the shorter edge to that, the aspect ratio kept;
            {"height": 256, "width": 256}: to that square, whatever the aspect ratio was; by default the shorter edge to
            crop_size · 256/224.
        do_resize: False to crop alone; an image smaller than the crop is then refused.
        resample: Pillow's filter, by number or name; always antialiased.
        rescale_factor, image_mean, image_std: value = (pixel · rescale_factor − mean) / std per channel.
        evaluation_transforms: what evaluation in training did, where that is not what is done here; for the reader.

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
        do_resize: bool = True,
        evaluation_transforms: list[Any] | None = None,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        crop = crop_size if isinstance(crop_size, int) else crop_size["height"]
        if size is None:
            size = round(crop * 256 / 224)
        self.size = {"shortest_edge": size} if isinstance(size, int) else dict(size)
        self.crop_size = {"height": crop, "width": crop}
        self.do_resize = do_resize
        if do_resize and (edge := min(self.size.values())) < crop:
            raise UserError(f"size: a shortest edge of {edge} is too small for a crop of {crop}; at least {crop}")
        try:
            self.resample = int(Image.Resampling[resample.upper()] if isinstance(resample, str) else resample)
            Image.Resampling(self.resample)
        except (KeyError, ValueError):
            names = ", ".join(f.name.lower() for f in Image.Resampling)
            raise UserError(f"resample: {resample!r} is not known; allowed: {names}") from None
        self.rescale_factor = rescale_factor
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        if evaluation_transforms is not None:
            self.evaluation_transforms = evaluation_transforms

    def preprocess(self, images: Any, return_tensors: str | TensorType | None = None) -> BatchFeature:
        """Pillow images, arrays or tensors, one or many, of any size and mode, to `pixel_values` (B, 3, S, S) fp32."""
        prepared = [self._prepared(image) for image in _each(images)]
        return BatchFeature(data={"pixel_values": prepared}, tensor_type=return_tensors)

    def fitted(self, picture: Image.Image | np.ndarray, rng: Any = None) -> Image.Image:
        """The square of `crop_size` that is seen of an upright picture, RGB or grey; a transform of vitds.data.

        Raises:
            UserError: without a resize, an image smaller than the crop.
        """
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(np.ascontiguousarray(picture))
        if self.do_resize:
            picture = picture.resize(self._resized(*picture.size), Image.Resampling(self.resample))
        crop = self.crop_size["height"]
        if min(picture.size) < crop:
            raise UserError(
                f"an image of {picture.width}×{picture.height} pixels is smaller than the {crop}×{crop} that the model sees, "
                "and its images are not resized (do_resize in preprocessor_config.json)"
            )
        left, top, width, height = middle(*picture.size, crop)
        return picture.crop((left, top, left + width, top + height))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        edge = self.size.get("shortest_edge")
        return (self.size["width"], self.size["height"]) if edge is None else shorter_edge_to(width, height, edge)

    @property
    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        """(scale, shift), fp32 (3,) each: a pixel p of a channel becomes p / scale − shift. By default 127.5 and 1, and that in
        fp32, as in training: a product with 1/255 would be another number in the last bit."""
        mean, std = np.asarray(self.image_mean), np.asarray(self.image_std)
        return (std / self.rescale_factor).astype(np.float32), (mean / std).astype(np.float32)

    def _prepared(self, image: Any) -> np.ndarray:
        pixels = np.asarray(self.fitted(upright_rgb(as_picture(image))), dtype=np.float32)
        scale, shift = self.levels
        return np.ascontiguousarray((pixels / scale - shift).transpose(2, 0, 1))  # (3, S, S)


def _each(images: Any) -> Iterator[Any]:
    if isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4:
        for image in images:
            yield from _each(image)
    else:
        yield images


def as_picture(image: Any) -> Image.Image:
    """A Pillow image of an array or tensor: (H, W), (H, W, C) or (C, H, W), of bytes or of fractions of one."""
    if isinstance(image, Image.Image):
        image.load()  # what an image's end says of its orientation is known only then
        return image
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if array.ndim == 2:
        array = array[..., None]
    return to_pil_image(array)
