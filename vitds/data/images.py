"""Bytes of an image file to 8-bit RGB."""

from __future__ import annotations

import io

from PIL import Image, JpegImagePlugin, UnidentifiedImageError

from vitds.pictures import orientation, upright_rgb

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
"""Pillow's decoders that may run, whatever a file is called: others shell out (EPS) or are seldom images at all."""
MAX_PIXELS = 89_478_485
"""Larger pictures are refused before they are decompressed (256 MiB as RGB; where Pillow begins to warn)."""
DRAFT_GAP = 2.0
"""A JPEG that is to be made smaller is decoded no smaller than this many times the size wanted: what the filter makes
of it then differs by a fraction of a grey level (docs/data.md, "Speed")."""
Box = tuple[float, float, float, float]
"""(left, top, width, height) in pixels."""


class Unusable(ValueError):
    """This is no image, or no label, that can be used; `str(error)` says why."""


class LazyJpeg:
    """A JPEG of which the header alone has been read: its size is known, its pixels wait for the size wanted of them."""

    def __init__(self, image: JpegImagePlugin.JpegImageFile) -> None:
        self._image = image
        self._orientation = orientation(image)
        width, height = image.size
        self.size = (height, width) if self._orientation >= 5 else (width, height)
        """Width and height, upright."""

    def decoded(self, smaller: int = 1) -> Image.Image:
        """The whole picture, upright and RGB, each edge divided by `smaller` (1, 2, 4 or 8) and rounded up.

        Raises:
            Unusable: truncated or corrupt.
        """
        width, height = self._image.size
        if smaller > 1:
            self._image.draft(None, (width // smaller, height // smaller))
        return _loaded(self._image, self._orientation)

    def part(self, box: Box, size: tuple[int, int]) -> tuple[Image.Image, Box]:
        """The whole picture and where `box` lies in it, decoded as small as is good for resizing that to `size`.

        Raises:
            Unusable: truncated or corrupt.
        """
        left, top, width, height = box
        spare = min(width / size[0], height / size[1]) / DRAFT_GAP
        smaller = next((scale for scale in (8, 4, 2) if scale <= spare), 1)
        # The last column of a smaller picture stands for fewer of the stored ones; mirrored, it is the first.
        left += -self.size[0] % smaller if self._orientation in (2, 3, 6, 7) else 0
        top += -self.size[1] % smaller if self._orientation in (3, 4, 7, 8) else 0
        picture = self.decoded(smaller)
        return picture, (left / smaller, top / smaller, width / smaller, height / smaller)


def decode(data: bytes) -> Image.Image:
    """The picture in `data` as a loaded Pillow image of mode RGB, upright.

    Grey is repeated over the channels, CMYK and palettes are converted, 16-bit grey keeps its high byte (as 16-bit RGB
    does in Pillow), what is transparent shows white, and EXIF orientation is applied. Of an animation, the first frame.

    Raises:
        Unusable: not an image of `FORMATS`, truncated or corrupt, or of more than `MAX_PIXELS` pixels.
    """
    picture = decode_lazily(data)
    return picture.decoded() if isinstance(picture, LazyJpeg) else picture


def decode_lazily(data: bytes) -> Image.Image | LazyJpeg:
    """As `decode`, but a JPEG's pixels are left for when it is known how many of them are wanted."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except MemoryError:
        raise
    except UnidentifiedImageError:  # whose own message names an address in memory
        raise Unusable(f"cannot identify it as {', '.join(FORMATS)}" if data else "no bytes") from None
    except Exception as error:  # On bad bytes decoders raise OSError, SyntaxError, ValueError, struct.error, …
        raise Unusable(f"{type(error).__name__}: {error}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Unusable(f"{width}×{height} pixels are more than {MAX_PIXELS}")
    return LazyJpeg(image) if isinstance(image, JpegImagePlugin.JpegImageFile) else _loaded(image)


def _loaded(image: Image.Image, turned: int | None = None) -> Image.Image:
    """Decoded, upright and RGB."""
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        raise Unusable(f"{type(error).__name__}: {error}") from error
    return upright_rgb(image, turned)
