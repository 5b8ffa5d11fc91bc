"""From a position or an index to pixels and labels, and many of them to one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from vitds.data.bad_samples import BadSample, too_many_bad
from vitds.data.batch import Layout
from vitds.data.images import LazyJpeg, Unusable, decode, decode_lazily
from vitds.data.order import Order
from vitds.data.randomness import augmentation_rng, mixup_rng
from vitds.data.skips import batch_start
from vitds.data.source import Label, Sample, Source, classes_of
from vitds.data.sources import Role
from vitds.data.storage import StorageError
from vitds.data.transforms import RESIZING, Picture, Transform
from vitds.errors import UserError


@dataclass
class Prepared:
    """What is told of a batch that was made elsewhere; its tensors lie in memory that both sides know."""

    positions: list[int] = field(default_factory=list)
    bad_samples: list[BadSample] = field(default_factory=list)
    error: UserError | StorageError | None = None
    """What the user can mend travels from a worker as a value: raised there, it would arrive wrapped in a traceback."""


class Batches(Protocol):
    """Batches by number, made in whichever process."""

    @property
    def layout(self) -> Layout:
        """How each of them lies in memory."""

    def fill(self, number: int, memory: torch.Tensor) -> Prepared:
        """Makes batch `number` in `memory`, uint8 (layout.nbytes,)."""


@dataclass(frozen=True)
class Images:
    """A source behind its transforms, checked against what the model takes."""

    source: Source
    transforms: Sequence[Transform]
    role: Role
    image_size: int
    num_classes: int
    max_bad_samples: int

    def prepare(self, sample: Sample, rng: np.random.Generator, position: int) -> tuple[np.ndarray, Label] | BadSample:
        """uint8 (S, S) or (S, S, 3) and the label of what the source has read.

        Raises:
            UserError: the transforms give another size.
        """
        stored, label, key = sample
        picture: Picture | LazyJpeg
        try:
            label = self._checked(label)
            picture = stored if isinstance(stored, np.ndarray) else self.decode(stored)
            for transform in self.transforms:
                picture = transform(picture, rng)
        except Unusable as error:
            return BadSample(key, str(error), position)
        pixels = np.asarray(picture)
        size = self.image_size
        if pixels.shape[:2] != (size, size):
            section = "train" if self.role == "train" else "eval"  # a minival's are the evaluation's
            raise UserError(
                f"vitds.data.{section}.transforms: {key} comes out {pixels.shape[0]}×{pixels.shape[1]}, "
                f'the model takes {size}×{size}; add "resize" or give the size'
            )
        return pixels, label

    @cached_property
    def decode(self) -> Callable[[bytes], Picture | LazyJpeg]:
        """What makes a picture of a file's bytes. For evaluation in full, as the image processor that is saved beside a
        checkpoint does it."""
        first = self.transforms[0] if self.transforms else None
        lazy = self.role == "train" and getattr(first, "func", first) in RESIZING
        return decode_lazily if lazy else decode

    def _checked(self, label: Label | Unusable) -> Label:
        if isinstance(label, Unusable):
            raise label
        for one in classes_of(label):
            if not 0 <= one < self.num_classes:
                raise Unusable(f"label {one} is not one of the model's {self.num_classes} classes")
        return label

    def labels(self, labels: Sequence[Label]) -> torch.Tensor:
        """int64 (B,), or of a multi-label source multi-hot float32 (B, C)."""
        return self.multi_hot(labels) if self.source.multi_label else torch.tensor(labels, dtype=torch.int64)

    def multi_hot(self, labels: Sequence[Label]) -> torch.Tensor:
        """float32 (B, C) with 1 at each label; a label named twice counts once."""
        hot = torch.zeros(len(labels), self.num_classes)
        for row, label in zip(hot, labels, strict=True):
            row[label] = 1
        return hot


@dataclass(frozen=True)
class TrainBatches:
    """Micro-batch number n of one rank, from the start of its stream at `position`."""

    images: Images
    order: Order
    seed: int
    mixup: float
    position: int
    global_batch: int
    micro_batch: int
    rank: int
    world_size: int
    skipped: tuple[tuple[int, int], ...] = ()
    """Ranges [start, end) of positions that the stream hops over; they and `position` are whole global batches."""

    def __post_init__(self) -> None:
        slices = self.micro_batch * self.world_size
        assert self.global_batch % slices == 0, f"{self.global_batch} images in slices of {slices}"
        for start, end in self.skipped:
            aligned = {start % self.global_batch, end % self.global_batch, self.position % self.global_batch} == {0}
            assert aligned and start < end, f"{start} to {end} from {self.position}, batches of {self.global_batch}"

    @property
    def accumulation(self) -> int:
        """Micro-batches of one rank in a global batch."""
        return self.global_batch // (self.micro_batch * self.world_size)

    def positions(self, number: int) -> range:
        """Positions of micro-batch `number`: of the global batch at [p, p + B), rank r has [p + rB/W, p + (r+1)B/W)."""
        part = number % self.accumulation
        first = self.global_start(number) + (self.rank * self.accumulation + part) * self.micro_batch
        return range(first, first + self.micro_batch)

    def global_start(self, number: int) -> int:
        """Position at which the global batch of micro-batch `number` begins."""
        return batch_start(number // self.accumulation, self.position, self.global_batch, self.skipped)

    @property
    def layout(self) -> Layout:
        classes = self.images.num_classes if self.mixup or self.images.source.multi_label else None
        return Layout(self.micro_batch, self.images.image_size, classes, mixed=self.mixup > 0)

    def fill(self, number: int, memory: torch.Tensor) -> Prepared:
        positions = self.positions(number)
        prepared = Prepared(list(positions))
        batch = self.layout.batch(memory, prepared.positions)
        try:
            (self._mix if self.mixup else self._plain)(positions, batch.images, batch.labels, prepared.bad_samples)
        except (UserError, StorageError) as error:
            prepared.error = error
        batch.is_real.fill_(True)
        return prepared

    def _plain(
        self, positions: Sequence[int], images: torch.Tensor, labels: torch.Tensor, bad_samples: list[BadSample]
    ) -> None:
        labels.copy_(self.images.labels(self._load(positions, rows_of(images), bad_samples)))

    def _mix(
        self, positions: Sequence[int], images: torch.Tensor, labels: torch.Tensor, bad_samples: list[BadSample]
    ) -> None:
        """Positions 2i and 2i+1 mixed with each other; a partner outside this slice is read as well.

        As in the reference, one weight a ~ Beta(p, p) per step, of which max(a, 1 − a) falls on the image itself.
        """
        wanted = sorted({near for position in positions for near in (position, position ^ 1)})
        size = self.images.image_size
        loaded = torch.empty(len(wanted), size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        hot = self.images.multi_hot(self._load(wanted, rows_of(loaded), bad_samples))
        row = {position: i for i, position in enumerate(wanted)}
        own = torch.tensor([row[position] for position in positions])
        partner = torch.tensor([row[position ^ 1] for position in positions])
        weight_of_step = {
            step: mixup_weight(self.seed, step, self.mixup)
            for step in {position // self.global_batch for position in positions}
        }
        weights = torch.tensor([weight_of_step[position // self.global_batch] for position in positions])  # (B,)
        pixels = loaded.float().div_(127.5).sub_(1)
        image_weights, label_weights = weights[:, None, None, None], weights[:, None]
        torch.add(image_weights * pixels[own], (1 - image_weights) * pixels[partner], out=images)
        torch.add(label_weights * hot[own], (1 - label_weights) * hot[partner], out=labels)

    def _load(self, positions: Sequence[int], rows: np.ndarray, bad_samples: list[BadSample]) -> list[Label]:
        """The labels of these positions' images, which come to stand in `rows`."""
        indices = self.order.indices(np.array(positions)).tolist()
        samples = self.images.source.read_many(indices)
        labels = []
        for row, position, index, sample in zip(rows, positions, indices, samples, strict=True):
            pixels, label = self._load_or_replace(position, index, sample, bad_samples)
            row[...] = rgb(pixels)
            labels.append(label)
        return labels

    def _load_or_replace(
        self, position: int, index: int, sample: Sample, bad_samples: list[BadSample]
    ) -> tuple[np.ndarray, Label]:
        """Image `index`, which has been read, or in place of one that cannot be used the next by index that can."""
        total = len(self.images.source)
        for offset in range(min(total, self.images.max_bad_samples + 1)):
            if offset:
                sample = self.images.source.read((index + offset) % total)
            loaded = self.images.prepare(sample, augmentation_rng(self.seed, position), position)
            if not isinstance(loaded, BadSample):
                return loaded
            bad_samples.append(loaded)
        raise UserError(too_many_bad(bad_samples, self.images.max_bad_samples, self.images.role))


@dataclass(frozen=True)
class EvalBatches:
    """Batch number n of one rank's share of an evaluation: every image once, then padding."""

    images: Images
    batch: int
    rank: int
    world_size: int

    def __len__(self) -> int:
        return -(-len(self.images.source) // (self.batch * self.world_size))

    @property
    def layout(self) -> Layout:
        classes = self.images.num_classes if self.images.source.multi_label else None
        return Layout(self.batch, self.images.image_size, classes, mixed=False)

    def fill(self, number: int, memory: torch.Tensor) -> Prepared:
        first = (number * self.world_size + self.rank) * self.batch
        indices = range(first, min(first + self.batch, len(self.images.source)))
        prepared = Prepared([*indices, *[-1] * (self.batch - len(indices))])
        batch = self.layout.batch(memory, prepared.positions)
        rows, is_real = rows_of(batch.images), batch.is_real.fill_(False)
        labels: list[Label] = [[] if self.images.source.multi_label else 0] * self.batch
        try:
            for i, (index, sample) in enumerate(zip(indices, self.images.source.read_many(indices), strict=True)):
                loaded = self.images.prepare(sample, augmentation_rng(0, index), index)
                if isinstance(loaded, BadSample):
                    prepared.bad_samples.append(loaded)
                else:
                    rows[i], labels[i] = rgb(loaded[0]), loaded[1]
                    is_real[i] = True
        except (UserError, StorageError) as error:
            prepared.error = error
        rows[~is_real.numpy()] = 0
        batch.labels.copy_(self.images.labels(labels))
        return prepared


def rows_of(images: torch.Tensor) -> np.ndarray:
    """Images (B, 3, S, S), whose channels come last in memory, as an array (B, S, S, 3) over the same memory."""
    return images.permute(0, 2, 3, 1).numpy()


def rgb(pixels: np.ndarray) -> np.ndarray:
    """(S, S, 3), or (S, S, 1) that is repeated when it is written, of (S, S, 3) or grey (S, S)."""
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def mixup_weight(seed: int, step: int, p: float) -> float:
    """max(a, 1 − a) in [½, 1] for the step's a ~ Beta(p, p)."""
    a = mixup_rng(seed, step).beta(p, p)
    return max(a, 1 - a)
