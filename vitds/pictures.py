"""What training, evaluation and use do alike to a Pillow image: upright, RGB, the shorter edge to a length, the middle."""

from __future__ import annotations

import numpy as np
from PIL import ExifTags, Image

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a stored picture upright, by EXIF orientation."""


def orientation(image: Image.Image) -> int:
    """1 to 8, as EXIF or XMP says; 1 where they say nothing that can be read: the pixels are sound all the same."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
        return found if found in TURNS else 1
    except Exception:  # as many kinds as there are ways to write EXIF wrongly
        return 1


def upright_rgb(image: Image.Image, turned: int | None = None) -> Image.Image:
    """A loaded image upright and in mode RGB; without a turn to make, and RGB already, it is the same object.

    Args:
        turned: its `orientation` where that is known; a JPEG's is known before it is loaded, another's only then.
    """
    turn = TURNS.get(orientation(image) if turned is None else turned)
    if turn is not None:
        image = image.transpose(turn)
        image.info = {
            word: value for word, value in image.info.items() if word == "transparency"
        }  # not to be turned twice
    return rgb(image)


def rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode: 16-bit grey keeps its high byte, what is transparent shows white."""
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


def shorter_edge_to(width: int, height: int, edge: int) -> tuple[int, int]:
    """(width, height) once the shorter edge is `edge`, the longer round(longer · edge / shorter)."""
    shorter = min(width, height)
    return round(width * edge / shorter), round(height * edge / shorter)


def middle(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """(left, top, width, height) of the middle size × size, from row ⌊(H − size)/2⌋ and column ⌊(W − size)/2⌋; of an edge
    shorter than that, all of it."""
    left, top = max(0, (width - size) // 2), max(0, (height - size) // 2)
    return left, top, min(size, width), min(size, height)
