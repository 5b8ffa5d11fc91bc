"""Loaders: one rank's part of the training stream, and of an evaluation."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from vitds import dist
from vitds.data.ahead import Ahead
from vitds.data.bad_samples import BadSample, BadSamples
from vitds.data.batch import Batch, Layout
from vitds.data.feed import Feed, Item
from vitds.data.order import build_order
from vitds.data.samples import EvalBatches, Images, TrainBatches
from vitds.data.section import DataSection, SourceSection
from vitds.data.skips import merged
from vitds.data.source import Source
from vitds.data.sources import Role, check_classes
from vitds.data.transforms import TRAIN_DEFAULT, Transform, build_transforms, eval_default
from vitds.errors import UserError

COPIED_AHEAD = ("cuda",)
"""Kinds of device to which batches are copied by a thread; a CPU would only lose by it."""


class TrainLoader:
    """Endless iterator over this rank's micro-batches, in step order.

    The stream of global batches is a pure function of (source, section, image_size, seed, global_batch, position):
    neither the world size nor the micro-batch nor the number of workers changes a pixel of it. The ranges [start, end)
    of `skipped`, whole global batches each, are left out of it, and change nothing of the rest.

    On a GPU the batches lie there already. Without one, and with workers, the micro-batches of the last global batch
    may be read; the memory of older ones is used again.
    """

    def __init__(
        self,
        source: Source,
        section: DataSection,
        *,
        image_size: int,
        num_classes: int,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        position: int = 0,
        skipped: Sequence[Sequence[int]] = (),
        bad: BadSamples | None = None,
    ) -> None:
        self._batches = TrainBatches(
            build_images(source, section, "train", image_size, num_classes),
            order=build_order(section.order, seed, len(source)),
            seed=seed,
            mixup=section.mixup,
            position=position,
            global_batch=global_batch,
            micro_batch=micro_batch,
            rank=rank,
            world_size=world_size,
            skipped=tuple(merged(skipped)),
        )
        self._items = _items(self._batches, itertools.count(), section, held=self._batches.accumulation)
        self._delivered = 0
        self.bad = bad or BadSamples(section.max_bad_samples)
        self.wait_seconds = 0.0
        """Time that the consumer has waited for batches, since the loader was made."""

    @property
    def bad_samples(self) -> list[BadSample]:
        """The unusable images met so far, each once; they were replaced by the next image that can be used."""
        return self.bad.found("train")

    @property
    def position(self) -> int:
        """Position of the global batch to which the next micro-batch belongs."""
        return self._batches.global_start(self._delivered)

    def keys(self, positions: Sequence[int]) -> list[str]:
        """By which names a person finds the images at these positions. Reads the source again, and never fails."""
        images, found = self._batches.images, []
        for index in self._batches.order.indices(np.array(positions)).tolist():
            try:
                found.append(images.source.key(index))
            except Exception as error:  # a report on one mistake must not end in another
                found.append(f"image {index} (cannot be read: {error})")
        return found

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch.

        Raises:
            UserError: images the model cannot take, or nothing to take the place of one that cannot be used; more bad
                samples than allowed are refused where the ranks share them (`bad.share`).
            StorageError: the storage failed, several times over.
        """
        start = time.perf_counter()
        item = next(self._items)
        self.wait_seconds += time.perf_counter() - start
        batch = _checked(item, self._batches.layout, "train", self.bad)
        self._delivered += 1
        return batch

    def close(self) -> None:
        """Ends what prepares batches: workers, thread."""
        self._items.close()


class EvalLoader:
    """This rank's share of an evaluation: over all ranks every image exactly once, `len` batches on every rank.

    Undecodable images count as not real, and are listed; iterating again starts anew. Where there are workers and no
    GPU, a batch is there until the next one is asked for. Transforms that are given take the place of the section's.
    """

    def __init__(
        self,
        source: Source,
        section: DataSection,
        *,
        image_size: int,
        num_classes: int,
        batch: int,
        rank: int,
        world_size: int,
        bad: BadSamples | None = None,
        role: Role = "eval",
        transforms: Sequence[Transform] | None = None,
    ) -> None:
        images = build_images(source, section, role, image_size, num_classes, transforms)
        self._section, self._role = section, role
        self._batches = EvalBatches(images, batch=batch, rank=rank, world_size=world_size)
        self.bad = bad or BadSamples(section.max_bad_samples)

    @property
    def bad_samples(self) -> list[BadSample]:
        """The unusable images met so far, each once; they count for nothing in the evaluation."""
        return self.bad.found(self._role)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        items = _items(self._batches, range(len(self)), self._section, held=1)
        try:
            for item in items:
                yield _checked(item, self._batches.layout, self._role, self.bad)
        finally:
            items.close()


def _items(
    batches: TrainBatches | EvalBatches, numbers: Iterable[int], section: DataSection, *, held: int
) -> Feed | Ahead:
    """Batches by number, on the device where there is one.

    Args:
        held: as Feed's. What goes to the device at once is not read after that.
    """
    device = dist.device()
    on_device = device.type in COPIED_AHEAD
    feed = Feed(batches, numbers, section, held=1 if on_device else held, page_locked=device.type == "cuda")
    return Ahead(feed, device) if on_device else feed


def _checked(item: Item, layout: Layout, role: Role, bad: BadSamples) -> Batch:
    """The batch, after note has been taken of its bad samples."""
    memory, prepared = item
    bad.meet(role, prepared.bad_samples)
    if isinstance(prepared.error, UserError):
        prepared.error.agreed = False  # the other ranks' images may be fine
        bad.keep_untold()
    if prepared.error is not None:
        raise prepared.error
    return layout.batch(memory, prepared.positions)


def build_images(
    source: Source,
    section: DataSection,
    role: Role,
    image_size: int,
    num_classes: int,
    transforms: Sequence[Transform] | None = None,
) -> Images:
    """The source's images as the model takes them in this role, by the section's transforms or those that are given.

    Raises:
        UserError: classes that the model does not have, or mistakes in the list of transforms.
    """
    check_classes(source, num_classes, role)
    if transforms is not None:
        return Images(source, transforms, role, image_size, num_classes, section.max_bad_samples)
    prepared_as: Role = "train" if role == "train" else "eval"
    own: SourceSection | None = getattr(section, prepared_as)
    spec = own.transforms if own is not None else None
    if spec is None:
        spec = TRAIN_DEFAULT if role == "train" else eval_default(image_size)
    transforms = build_transforms(spec, image_size, f"vitds.data.{prepared_as}.transforms")
    return Images(source, transforms, role, image_size, num_classes, section.max_bad_samples)
