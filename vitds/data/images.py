"""Bytes of an image file to 8-bit RGB."""

from __future__ import annotations

import contextlib
import io

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
"""Pillow's decoders that may run, whatever a file is called: others shell out (EPS) or are seldom images at all."""
MAX_PIXELS = 89_478_485
"""Larger pictures are refused before they are decompressed (256 MiB as RGB; where Pillow begins to warn)."""


class Unusable(ValueError):
    """This is no image, or no label, that can be used; `str(error)` says why."""


def decode(data: bytes) -> Image.Image:
    """The picture in `data` as a loaded Pillow image of mode RGB, upright.

    Grey is repeated over the channels, CMYK and palettes are converted, 16-bit grey keeps its high byte (as 16-bit RGB
    does in Pillow), what is transparent shows white, and EXIF orientation is applied. Of an animation, the first frame.

    Raises:
        Unusable: not an image of `FORMATS`, truncated or corrupt, or of more than `MAX_PIXELS` pixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise Unusable(f"{width}×{height} pixels are more than {MAX_PIXELS}")
        image.load()
    except (Unusable, MemoryError):
        raise
    except Exception as error:  # On bad bytes decoders raise OSError, SyntaxError, ValueError, struct.error, …
        raise Unusable(f"{type(error).__name__}: {error}" if data else "no bytes") from error
    with contextlib.suppress(Exception):  # Malformed EXIF: the pixels are sound, and turned before Pillow rewrites it.
        ImageOps.exif_transpose(image, in_place=True)
    return _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255.
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
