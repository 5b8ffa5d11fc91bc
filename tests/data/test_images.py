"""Decoding: every way in which a file can hold a picture, and the ways in which it can fail to."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vitds.data.images import MAX_PIXELS, Unusable, decode, decode_lazily

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


def png(width, height, depth, kind, rows):
    """A PNG written by hand, for what Pillow does not write: bits a channel, colour type and rows of channel values."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    lines = b"".join(b"\0" + struct.pack(f">{len(row)}{'H' if depth == 16 else 'B'}", *row) for row in rows)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def deep(kind, *values):
    return png(16, 24, 16, kind, [values * 16] * 24)


def ycck(*stored_values):
    """Of these four stored values, luma, two chromas and key: a CMYK file whose Adobe marker says YCCK."""
    file = bytearray(stored(flat("CMYK", tuple(255 - value for value in stored_values)), "JPEG", quality=100))
    file[file.index(b"Adobe") + 11] = 2
    return bytes(file)


DEEP = Image.fromarray(np.full((24, 16), 0x8C3F, dtype=np.uint16))
CASES = {
    "rgb jpeg": (stored(flat("RGB", RED), "JPEG", quality=95), RED, 4),
    "grey jpeg": (stored(flat("L", 77), "JPEG"), (77, 77, 77), 1),
    "cmyk jpeg": (stored(flat("RGB", RED).convert("CMYK"), "JPEG", quality=95), RED, 4),
    # As Photoshop writes it, inverted: cyan ink is Y + 1.402 (Cr − 128), red (255 − cyan ink) · key / 255.
    "ycck jpeg": (ycck(140, 120, 150, 204), (67, 102, 103), 1),
    "palette": (palette(RED), RED, 0),
    "transparent palette": (palette(RED, transparent=True), (255, 255, 255), 0),
    "half transparent": (stored(flat("RGBA", (200, 30, 60, 51)), "PNG"), (244, 210, 216), 1),
    "hidden colour": (stored(flat("RGBA", (0, 0, 0, 0)), "WEBP", lossless=True), (255, 255, 255), 0),
    "grey and alpha": (stored(flat("LA", (100, 255)), "PNG"), (100, 100, 100), 0),
    "transparent rgb": (stored(flat("RGB", RED), "PNG", transparency=RED), (255, 255, 255), 0),
    "16-bit grey": (stored(DEEP, "PNG"), (0x8C, 0x8C, 0x8C), 0),
    "16-bit rgb": (deep(2, 0xC81E, 0x1EFF, 0x3C80), RED, 0),
    "16-bit rgba": (deep(6, 0xC800, 0x1E00, 0x3C00, 0x3333), (244, 210, 216), 1),
    "16-bit grey and alpha": (deep(4, 0x6400, 0xFFFF), (100, 100, 100), 0),
    "one bit": (stored(flat("1", 1), "PNG"), (255, 255, 255), 0),
    "webp": (stored(flat("RGB", RED), "WEBP", lossless=True), RED, 0),
    "bmp": (stored(flat("RGB", RED), "BMP"), RED, 0),
    "two pictures": (stored(flat("RGB", RED), "MPO", save_all=True, append_images=[flat("RGB", 0)]), RED, 4),
    "animated png": (stored(flat("RGB", RED), "PNG", save_all=True, append_images=[flat("RGB", 0)]), RED, 0),
    "animation": (stored(flat("RGB", RED), "WEBP", save_all=True, append_images=[flat("RGB", 0)]), RED, 4),
}


@pytest.mark.parametrize("name", CASES)
def test_every_mode_becomes_rgb(name):
    data, color, tolerance = CASES[name]
    pixels = np.asarray(decode(data)).astype(int)
    assert pixels.shape == (24, 16, 3)
    assert np.abs(pixels - color).max() <= tolerance


UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}
"""What a viewer must do, by EXIF's words on where the stored first row and column belong."""


def turned(pixels, orientation, format, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return stored(Image.fromarray(pixels), format, exif=exif, **options)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    expected = UPRIGHT[orientation](pixels)
    np.testing.assert_array_equal(np.asarray(decode(turned(pixels, orientation, "PNG"))), expected)
    data = turned(pixels, orientation, "JPEG", quality=100, subsampling=0)
    assert np.abs(np.asarray(decode(data)).astype(int) - expected).max() < 12
    assert decode_lazily(data).size == expected.shape[1::-1]


RAMPS = np.stack(np.broadcast_arrays(np.linspace(0, 255, 605), np.linspace(0, 255, 403)[:, None], 128), axis=-1)
"""Red says the column, green the row; neither edge is a multiple of 8."""


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(("edge", "smaller"), [(81, 1), (80, 2), (40, 4), (20, 8)])
def test_a_jpeg_decoded_small_shows_the_same_part(orientation, edge, smaller):
    data = turned(RAMPS.astype(np.uint8), orientation, "JPEG", quality=95)
    width, height = decode_lazily(data).size
    box = (width - 320, height - 322, 320, 322)  # at the far edges, where the last block is not full
    picture, (left, top, *extent) = decode_lazily(data).part(box, (edge, edge))
    assert picture.size == (-(-width // smaller), -(-height // smaller))
    assert extent == [320 / smaller, 322 / smaller]
    found, expected = (
        np.asarray(one.resize((edge, edge), Image.Resampling.BILINEAR, (x, y, x + w, y + h))).astype(float)
        for one, (x, y, w, h) in ((picture, (left, top, *extent)), (decode(data), box))
    )
    assert np.abs(found - expected).mean() < 0.75
    assert np.abs((found - expected).mean(axis=(0, 1))).max() < (
        0.6 if smaller == 8 else 0.3
    )  # mirrored without care: at least 1.2 and 0.4


def test_what_is_wanted_whole_is_decoded_whole():
    data = stored(Image.fromarray(RAMPS.astype(np.uint8)), "JPEG")
    lazy = decode_lazily(data)
    assert lazy.size == (605, 403)
    np.testing.assert_array_equal(np.asarray(lazy.decoded()), np.asarray(decode(data)))
    with pytest.raises(Unusable, match="truncated"):
        decode_lazily(data[:-500]).part((0, 0, 605, 403), (32, 32))


def test_broken_exif_leaves_the_picture():
    """Turned by a quarter, and a resolution that is text: Pillow turns the pixels, then cannot rewrite the EXIF."""
    entries = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack(">HHI4s", 0x011A, 2, 1, b"abcd")
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 2) + entries + bytes(4)
    pixels = np.asarray(decode(stored(flat("RGB", RED, (24, 16)), "JPEG", exif=exif, quality=95))).astype(int)
    assert pixels.shape == (24, 16, 3)
    assert np.abs(pixels - RED).max() < 5


def png_of_zeros(width, height):
    """As wide and high as it says and nearly nothing in the file: a grey bit a pixel."""
    return png(width, height, 1, 0, [[0] * -(-width // 8)] * height)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no bytes"),
        (b"<html>404</html>", "cannot identify"),
        (CASES["rgb jpeg"][0][:-200], "(?i)truncated"),
        (CASES["webp"][0][:-6], ":"),
        (stored(flat("RGB", RED), "EPS"), "cannot identify"),
        (png(MAX_PIXELS // 1000, 1001, 8, 2, []), "pixels are more than"),
        (png_of_zeros(50_000, 50_000), "(?i)pixels"),
        (png(0, 5, 8, 2, [[]] * 5), "cannot identify"),
        (png(5, 0, 8, 2, []), "cannot identify"),
        (stored(flat("RGB", RED, (16, 16)), "JPEG").replace(b"\x08\0\x10\0\x10", b"\x08\0\0\0\x10"), "cannot identify"),
        (stored(flat("RGB", RED), "PNG")[:-30], "(?i)truncated"),
    ],
    ids=[
        "empty",
        "text",
        "truncated jpeg",
        "truncated webp",
        "other format",
        "bomb",
        "bomb of kilobytes",
        "no columns",
        "no rows",
        "jpeg without rows",
        "truncated png",
    ],
)
def test_what_cannot_be_decoded_says_why(data, reason):
    with pytest.raises(Unusable, match=reason):
        decode(data)
