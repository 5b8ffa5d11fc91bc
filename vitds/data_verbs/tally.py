"""What is counted of a set of images, in pieces that can be added up."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile

from vitds.data.images import FORMATS, MAX_PIXELS, Unusable, decode
from vitds.data.source import Sample, classes_of

ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
KINDS = {"L": "grey", "1": "1-bit", "P": "palette", "CMYK": "CMYK", "YCCK": "CMYK"}


@dataclass(frozen=True, order=True)
class Measured:
    """An image's size in pixels, and its key."""

    pixels: int
    width: int
    height: int
    key: str


@dataclass
class Tally:
    """Counts over some images. Sizes are upright: what EXIF turns by a quarter has its edges exchanged."""

    images: int = 0
    stored_bytes: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    labels_per_image: Counter[int] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    """Images of which there is something to know: grey, CMYK, palette, 16-bit, alpha, EXIF-rotated."""
    widths: Counter[int] = field(default_factory=Counter)
    heights: Counter[int] = field(default_factory=Counter)
    smallest: Measured | None = None
    largest: Measured | None = None
    broken: list[tuple[str, str]] = field(default_factory=list)
    """(key, reason) of what training would replace."""

    def add(self, sample: Sample, num_classes: int | None, decoded: bool) -> None:
        """Count an image.

        Args:
            sample: as its source gives it.
            num_classes: labels from here on are wrong; None where no model is known.
            decoded: decode the whole image, not only its header.
        """
        image, label, key = sample
        self.images += 1
        self.stored_bytes += len(image) if isinstance(image, bytes) else image.nbytes
        try:
            if isinstance(label, Unusable):
                raise label
            listed = classes_of(label)
            self.labels.update(set(listed))
            self.labels_per_image[len(listed)] += 1
            wrong = [one for one in listed if one < 0 or (num_classes is not None and one >= num_classes)]
            if wrong:
                raise Unusable(f"label {wrong[0]} is not one of the model's {num_classes} classes")
            if isinstance(image, bytes):
                self._add_file(image, key, decoded)
            else:
                self._add_shape("array", image.shape[1], image.shape[0], key, ["grey"] if image.ndim == 2 else [])
        except Unusable as error:
            self.broken.append((key, str(error)))

    def _add_file(self, data: bytes, key: str, decoded: bool) -> None:
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Exception:  # decoders raise many kinds; `decode` has the words for it
            decode(data)
            raise
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise Unusable(f"{width}×{height} pixels are more than {MAX_PIXELS}")
        kinds = [KINDS[image.mode]] if image.mode in KINDS else ["16-bit"] if _has_16_bits(image) else []
        if image.mode in ALPHA_MODES or "transparency" in image.info:
            kinds.append("alpha")
        turn = _orientation(image)
        if turn != 1:
            kinds.append("EXIF-rotated")
        if decoded:
            decode(data)
        self._add_shape(str(image.format), *((height, width) if turn >= 5 else (width, height)), key, kinds)

    def _add_shape(self, form: str, width: int, height: int, key: str, kinds: list[str]) -> None:
        self.formats[form] += 1
        self.kinds.update(kinds)
        self.widths[width] += 1
        self.heights[height] += 1
        measured = Measured(width * height, width, height, key)
        self.smallest = min(measured, self.smallest or measured)
        self.largest = max(measured, self.largest or measured)

    def merge(self, other: Tally) -> None:
        """Count what another has counted of other images."""
        self.images += other.images
        self.stored_bytes += other.stored_bytes
        self.broken += other.broken
        for name in ("labels", "labels_per_image", "formats", "kinds", "widths", "heights"):
            getattr(self, name).update(getattr(other, name))
        self.smallest = min(filter(None, (self.smallest, other.smallest)), default=None)
        self.largest = max(filter(None, (self.largest, other.largest)), default=None)


def quantiles(counts: Counter[int]) -> dict[str, int]:
    """Smallest, quartiles, 95th percentile and largest of counted values; the value at or below which that share lies."""
    if not counts:
        return {}
    values = np.array(sorted(counts))
    share = np.cumsum([counts[int(value)] for value in values]) / counts.total()
    at = {"least": 0.0, "25 %": 0.25, "50 %": 0.5, "75 %": 0.75, "95 %": 0.95, "most": 1.0}
    return {name: int(values[min(int(np.searchsorted(share, part)), len(values) - 1)]) for name, part in at.items()}


def _has_16_bits(image: Image.Image) -> bool:
    """Of colours the mode does not tell; how Pillow will unpack a PNG's pixels does."""
    tiles = image.tile if isinstance(image, ImageFile.ImageFile) and image.format == "PNG" else []
    return image.mode.startswith("I") or any("16" in str(tile[3]) for tile in tiles)


def _orientation(image: Image.Image) -> int:
    """As EXIF in the header says; Pillow would decode a PNG to look behind its pixels."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1) if "exif" in image.info else 1
        return found if found in range(1, 9) else 1
    except Exception:  # malformed EXIF: the pixels are sound
        return 1


def summary(tally: Tally, class_names: list[str]) -> dict[str, Any]:
    """What was counted, for JSON. `classes` are those with a name or an image."""
    classes = sorted({*range(len(class_names)), *tally.labels})
    names = dict(enumerate(class_names))
    named = [
        {"label": label, **({"name": names[label]} if label in names else {}), "images": tally.labels[label]}
        for label in classes
    ]
    return {
        "images": tally.images, "bytes": tally.stored_bytes, "classes": named,
        "labels_per_image": {str(count): images for count, images in sorted(tally.labels_per_image.items())},
        "formats": dict(tally.formats.most_common()), "kinds": dict(tally.kinds.most_common()),
        "width": quantiles(tally.widths), "height": quantiles(tally.heights),
        "smallest": tally.smallest and vars(tally.smallest), "largest": tally.largest and vars(tally.largest),
        "broken": [{"key": key, "reason": reason} for key, reason in sorted(tally.broken)],
    }  # fmt: skip
