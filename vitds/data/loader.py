"""Loaders: one rank's part of the training stream, and of an evaluation."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from vitds import dist
from vitds.data.bad_samples import BadSample, BadSamples
from vitds.data.batch import Batch
from vitds.data.order import build_order
from vitds.data.samples import EvalBatches, Images, Prepared, TrainBatches
from vitds.data.section import DataSection, SourceSection
from vitds.data.skips import merged
from vitds.data.source import Source
from vitds.data.sources import Role, check_classes
from vitds.data.transforms import TRAIN_DEFAULT, build_transforms, eval_default
from vitds.errors import UserError


class TrainLoader:
    """Endless iterator over this rank's micro-batches, in step order.

    The stream of global batches is a pure function of (source, section, image_size, seed, global_batch, position):
    neither the world size nor the micro-batch nor the number of workers changes a pixel of it. The ranges [start, end)
    of `skipped`, whole global batches each, are left out of it, and change nothing of the rest.
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
            _images(source, section, section.train, "train", image_size, num_classes),
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
        self._feed = _Feed(self._batches, itertools.count(), section)
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
        prepared = next(self._feed)
        self.wait_seconds += time.perf_counter() - start
        batch = _checked(prepared, "train", self.bad)
        self._delivered += 1
        return batch

    def close(self) -> None:
        """Ends the workers."""
        self._feed.close()


class EvalLoader:
    """This rank's share of an evaluation: over all ranks every image exactly once, `len` batches on every rank.

    Undecodable images count as not real, and are listed; iterating again starts anew.
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
    ) -> None:
        images = _images(source, section, section.eval, "eval", image_size, num_classes)
        self._section = section
        self._batches = EvalBatches(images, batch=batch, rank=rank, world_size=world_size)
        self.bad = bad or BadSamples(section.max_bad_samples)

    @property
    def bad_samples(self) -> list[BadSample]:
        """The unusable images met so far, each once; they count for nothing in the evaluation."""
        return self.bad.found("eval")

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        feed = _Feed(self._batches, range(len(self)), self._section)
        try:
            for prepared in feed:
                yield _checked(prepared, "eval", self.bad)
        finally:
            feed.close()


class _Feed:
    """`batches[n]` for each of `numbers`, in order, made here or ahead of time by worker processes."""

    def __init__(self, batches: TrainBatches | EvalBatches, numbers: Iterable[int], section: DataSection) -> None:
        self._pin = dist.device().type == "cuda"
        self._in_workers = section.num_workers > 0
        self._items: Iterator[Prepared]
        if not self._in_workers:
            self._items = (batches[number] for number in numbers)
            return
        self._items = iter(
            DataLoader(
                batches,
                batch_size=None,
                sampler=numbers,
                num_workers=section.num_workers,
                prefetch_factor=section.prefetch,
                collate_fn=_as_it_is,
                pin_memory=self._pin,
                worker_init_fn=_obey_only_the_parent,
                generator=torch.Generator(),  # Else starting workers would draw from the training process's own.
            )
        )

    def __iter__(self) -> Iterator[Prepared]:
        return self

    def __next__(self) -> Prepared:
        prepared = next(self._items)
        return prepared.pin_memory() if self._pin and not self._in_workers else prepared

    def close(self) -> None:
        """Ends the workers, by force if need be.

        Letting go of torch's iterator would end them too, but not while the traceback of an error holds on to it.
        """
        if self._in_workers:
            self._items._shutdown_workers()  # type: ignore[attr-defined]


def _checked(prepared: Prepared, role: Role, bad: BadSamples) -> Batch:
    """The batch, after note has been taken of its bad samples."""
    bad.meet(role, prepared.bad_samples)
    if isinstance(prepared.error, UserError):
        prepared.error.agreed = False  # the other ranks' images may be fine
        bad.keep_untold()
    if prepared.error is not None:
        raise prepared.error
    assert prepared.batch is not None
    return prepared.batch


def _images(
    source: Source, section: DataSection, own: SourceSection | None, role: Role, image_size: int, num_classes: int
) -> Images:
    check_classes(source, num_classes, role)
    spec = own.transforms if own is not None else None
    if spec is None:
        spec = TRAIN_DEFAULT if role == "train" else eval_default(image_size)
    transforms = build_transforms(spec, image_size, f"vitds.data.{role}.transforms")
    return Images(source, transforms, role, image_size, num_classes, section.max_bad_samples)


def _as_it_is(item: Any) -> Any:
    return item


def _obey_only_the_parent(worker: int) -> None:
    """Makes this worker end on SIGTERM from its rank alone, and deaf to SIGINT and SIGUSR1.

    A job's end is signalled to all its processes at once; a worker that died of it would fail the rank, which still has
    a checkpoint to save.
    """
    parent = os.getppid()
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def wait_for_parent() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait_for_parent, daemon=True).start()
