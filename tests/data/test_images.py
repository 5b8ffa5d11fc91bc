"""Decoding: every way in which a file can hold a picture, and the ways in which it can fail to."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vitds.data.images import MAX_PIXELS, Unusable, decode

RED = (200, 30, 60)


def stored(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def flat(mode, color, size=(16, 24)):
    return Image.new(mode, size, color)


def palette(color, transparent=False):
    image = Image.new("P", (16, 24), 1)
    image.putpalette([0, 0, 0, *color])
    return stored(image, "PNG", **({"transparency": 1} if transparent else {}))


DEEP = Image.fromarray(np.full((24, 16), 0x8C3F, dtype=np.uint16))
CASES = {
    "rgb jpeg": (stored(flat("RGB", RED), "JPEG", quality=95), RED, 4),
    "grey jpeg": (stored(flat("L", 77), "JPEG"), (77, 77, 77), 1),
    "cmyk jpeg": (stored(flat("RGB", RED).convert("CMYK"), "JPEG", quality=95), RED, 4),
    "palette": (palette(RED), RED, 0),
    "transparent palette": (palette(RED, transparent=True), (255, 255, 255), 0),
    "half transparent": (stored(flat("RGBA", (200, 30, 60, 51)), "PNG"), (244, 210, 216), 1),
    "hidden colour": (stored(flat("RGBA", (0, 0, 0, 0)), "WEBP", lossless=True), (255, 255, 255), 0),
    "grey and alpha": (stored(flat("LA", (100, 255)), "PNG"), (100, 100, 100), 0),
    "transparent rgb": (stored(flat("RGB", RED), "PNG", transparency=RED), (255, 255, 255), 0),
    "16-bit grey": (stored(DEEP, "PNG"), (0x8C, 0x8C, 0x8C), 0),
    "one bit": (stored(flat("1", 1), "PNG"), (255, 255, 255), 0),
    "webp": (stored(flat("RGB", RED), "WEBP", lossless=True), RED, 0),
    "bmp": (stored(flat("RGB", RED), "BMP"), RED, 0),
    "two pictures": (stored(flat("RGB", RED), "MPO", save_all=True, append_images=[flat("RGB", 0)]), RED, 4),
    "animation": (stored(flat("RGB", RED), "WEBP", save_all=True, append_images=[flat("RGB", 0)]), RED, 4),
}


@pytest.mark.parametrize("name", CASES)
def test_every_mode_becomes_rgb(name):
    data, color, tolerance = CASES[name]
    pixels = np.asarray(decode(data)).astype(int)
    assert pixels.shape == (24, 16, 3)
    assert np.abs(pixels - color).max() <= tolerance


def test_exif_orientation_is_applied():
    upright = np.zeros((24, 16, 3), dtype=np.uint8)
    upright[:8, :8] = 255  # a white corner, top left
    for orientation, turn in ((3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90)):
        exif = Image.Exif()
        exif[0x0112] = orientation  # how a viewer must turn what is stored
        data = stored(Image.fromarray(upright).transpose(turn), "JPEG", exif=exif, quality=95)
        assert np.abs(np.asarray(decode(data)).astype(int) - upright).max() < 12


def test_broken_exif_leaves_the_picture():
    """Turned by a quarter, and a resolution that is text: Pillow turns the pixels, then cannot rewrite the EXIF."""
    entries = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack(">HHI4s", 0x011A, 2, 1, b"abcd")
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 2) + entries + bytes(4)
    pixels = np.asarray(decode(stored(flat("RGB", RED, (24, 16)), "JPEG", exif=exif, quality=95))).astype(int)
    assert pixels.shape == (24, 16, 3)
    assert np.abs(pixels - RED).max() < 5


def bomb():
    header = struct.pack(">IIBBBBB", MAX_PIXELS // 1000, 1001, 8, 2, 0, 0, 0)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no bytes"),
        (b"<html>404</html>", "cannot identify"),
        (CASES["rgb jpeg"][0][:-200], "(?i)truncated"),
        (CASES["webp"][0][:-6], ":"),
        (stored(flat("RGB", RED), "EPS"), "cannot identify"),
        (bomb(), "pixels are more than"),
    ],
    ids=["empty", "text", "truncated jpeg", "truncated webp", "other format", "bomb"],
)
def test_what_cannot_be_decoded_says_why(data, reason):
    with pytest.raises(Unusable, match=reason):
        decode(data)
