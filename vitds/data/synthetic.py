"""Noise with labels, as fast as memory: for benchmarks and for trying a run without data."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from vitds.data.source import Sample, Source

if TYPE_CHECKING:
    from vitds.data.section import SourceSection

POOL = 64


class Synthetic(Source):
    """Image `index` is one of a pool of 64 noise images, its label index modulo the number of classes."""

    keys: ClassVar[tuple[str, ...]] = ("num_images", "num_classes", "image_size")

    def __init__(self, section: SourceSection, role: str) -> None:
        self.num_images = section.num_images or 10_000
        self.class_names = [str(label) for label in range(section.num_classes or 1000)]
        size = section.image_size or 224
        rng = np.random.Generator(np.random.Philox(0))
        self.pool = rng.integers(0, 256, (min(POOL, self.num_images), size, size, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return self.num_images

    def key(self, index: int) -> str:
        return f"synthetic/{index}"

    def read(self, index: int) -> Sample:
        return self.pool[index % len(self.pool)], index % len(self.class_names), self.key(index)
