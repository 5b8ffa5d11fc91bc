"""How alike two pictures look: small grey versions of them, 63-bit hashes of those, and their correlation.

The hash is the usual perceptual one: the signs of a picture's lowest frequencies about their median. Recompressed,
resized or brightened it keeps most of its bits; the correlation then tells pictures that merely share a layout apart.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from vitds.data.images import LazyJpeg, decode_lazily

EDGE = 32
"""Height and width of a small grey version."""
WIDE_EDGE = 2 * EDGE
"""Of the versions from which parts are cut; a JPEG is decoded no smaller than this."""
VIEWS = (
    (0.0, 0.0, 1.0),
    *(
        (left * lost, top * lost, 1 - lost)
        for lost in (0.025, 0.05, 0.1)
        for left, top in ((0.5, 0.5), (0, 0), (1, 0), (0, 1), (1, 1))
    ),
)
"""(left, top, edge) of parts of a picture, of its edges: the whole; without 2.5, 5 and 10 percent, at the middle and the
corners. A copy that was cropped looks like one of them."""
FREQUENCIES = 8
BITS = FREQUENCIES**2 - 1
FLAT = 3.0
"""A picture whose small version has a smaller standard deviation (of 0…255) has no layout to compare."""

_angles = np.pi / (2 * EDGE) * np.outer(np.arange(FREQUENCIES), 2 * np.arange(EDGE) + 1)
_DCT = np.cos(_angles).astype(np.float32)
"""The lowest rows of the DCT-II, (8, 32); their scale matters for no bit but the first, which is left out."""
_MIRRORED = np.where(np.arange(FREQUENCIES) % 2, -1, 1).astype(np.float32)
"""What becomes of the horizontal frequencies of a picture that is mirrored left to right."""


def grey(image: bytes | np.ndarray, edge: int = EDGE) -> np.ndarray:
    """The picture squeezed to uint8 (edge, edge), grey and upright.

    Raises:
        Unusable: it cannot be decoded.
    """
    picture = decode_lazily(image) if isinstance(image, bytes) else Image.fromarray(image)
    if isinstance(picture, LazyJpeg):
        spare = min(picture.size) // WIDE_EDGE
        picture = picture.decoded(next((scale for scale in (8, 4, 2) if scale <= spare), 1))
    return np.asarray(picture.convert("L").resize((edge, edge), Image.Resampling.BOX))


def view(wide: np.ndarray, number: int) -> np.ndarray:
    """Part VIEWS[number] of a grey version (64, 64), squeezed to (32, 32)."""
    left, top, edge = (WIDE_EDGE * share for share in VIEWS[number])
    box = (left, top, left + edge, top + edge)
    return np.asarray(Image.fromarray(wide).resize((EDGE, EDGE), Image.Resampling.BOX, box=box))


def hashes(small: np.ndarray, mirrored: bool = False) -> np.ndarray:
    """Hashes, uint64 (B,), of small grey versions (B, 32, 32), or of their mirror images.

    Bit i is set where frequency i, of all but the constant one in rows of 8, is above the median of the 63.
    """
    spectra = _DCT @ small.astype(np.float32) @ _DCT.T  # (B, 8, 8)
    if mirrored:
        spectra = spectra * _MIRRORED
    found = spectra.reshape(len(small), -1)[:, 1:]
    bits = found > np.median(found, axis=1, keepdims=True)  # (B, 63)
    return (bits.astype(np.uint64) << np.arange(BITS, dtype=np.uint64)).sum(axis=1, dtype=np.uint64)


def is_flat(small: np.ndarray) -> np.ndarray:
    """Which of the small grey versions (B, 32, 32) show nothing, bool (B,)."""
    return small.reshape(len(small), -1).std(axis=1) < FLAT


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation of small grey versions a (…, 32, 32) and b (…, 32, 32), in [−1, 1]; neither is flat."""
    a, b = (x.reshape(*x.shape[:-2], -1).astype(np.float64) for x in (a, b))
    a, b = (x - x.mean(axis=-1, keepdims=True) for x in (a, b))
    return (a * b).sum(axis=-1) / np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
