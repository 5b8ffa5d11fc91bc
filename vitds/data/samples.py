"""From a position or an index to pixels and labels, and many of them to one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Dataset

from vitds.data.bad_samples import BadSample, too_many_bad
from vitds.data.batch import Batch
from vitds.data.images import Unusable, decode
from vitds.data.order import Order
from vitds.data.randomness import augmentation_rng, mixup_rng
from vitds.data.skips import batch_start
from vitds.data.source import Label, Sample, Source
from vitds.data.sources import Role
from vitds.data.storage import StorageError
from vitds.data.transforms import Transform
from vitds.errors import UserError


@dataclass
class Prepared:
    """A batch on its way from where it was made, with what was found amiss there."""

    batch: Batch | None = None
    bad_samples: list[BadSample] = field(default_factory=list)
    error: UserError | StorageError | None = None
    """What the user can mend travels from a worker as a value: raised there, it would arrive wrapped in a traceback."""

    def pin_memory(self) -> Prepared:
        """With the batch in page-locked memory; torch's DataLoader calls this on what its workers send."""
        if self.batch is not None:
            self.batch = self.batch.pin_memory()
        return self


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
        try:
            label = self._checked(label)
            picture = stored if isinstance(stored, np.ndarray) else decode(stored)
        except Unusable as error:
            return BadSample(key, str(error), position)
        for transform in self.transforms:
            picture = transform(picture, rng)
        pixels = np.asarray(picture)
        size = self.image_size
        if pixels.shape[:2] != (size, size):
            raise UserError(
                f"vitds.data.{self.role}.transforms: {key} comes out {pixels.shape[0]}×{pixels.shape[1]}, "
                f'the model takes {size}×{size}; add "resize" or give the size'
            )
        return pixels, label

    def _checked(self, label: Label | Unusable) -> Label:
        if isinstance(label, Unusable):
            raise label
        for one in (label,) if isinstance(label, int) else label:
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

    def stack(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 (B, 3, S, S); grey is repeated."""
        stacked = np.empty((len(pictures), 3, self.image_size, self.image_size), dtype=np.uint8)
        for place, pixels in zip(stacked, pictures, strict=True):
            place[...] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return stacked


@dataclass(frozen=True)
class TrainBatches(Dataset[Prepared]):
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

    def __getitem__(self, number: int) -> Prepared:
        bad_samples: list[BadSample] = []
        try:
            positions = self.positions(number)
            images, labels = (self._mixed if self.mixup else self._plain)(positions, bad_samples)
        except (UserError, StorageError) as error:
            return Prepared(bad_samples=bad_samples, error=error)
        return Prepared(
            Batch(images, labels, list(positions), torch.ones(len(positions), dtype=torch.bool)), bad_samples
        )

    def _plain(self, positions: Sequence[int], bad_samples: list[BadSample]) -> tuple[torch.Tensor, torch.Tensor]:
        pictures, labels = self._load(positions, bad_samples)
        return torch.from_numpy(self.images.stack(pictures)), self.images.labels(labels)

    def _mixed(self, positions: Sequence[int], bad_samples: list[BadSample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions 2i and 2i+1 mixed with each other; a partner outside this slice is read as well.

        As in the reference, one weight a ~ Beta(p, p) per step, of which max(a, 1 − a) falls on the image itself.
        """
        wanted = sorted({near for position in positions for near in (position, position ^ 1)})
        pictures, labels = self._load(wanted, bad_samples)
        row = {position: i for i, position in enumerate(wanted)}
        own = torch.tensor([row[position] for position in positions])
        partner = torch.tensor([row[position ^ 1] for position in positions])
        weight_of_step = {
            step: mixup_weight(self.seed, step, self.mixup)
            for step in {position // self.global_batch for position in positions}
        }
        weights = torch.tensor([weight_of_step[position // self.global_batch] for position in positions])  # (B,)
        pixels = torch.from_numpy(self.images.stack(pictures)).float().div_(127.5).sub_(1)
        hot = self.images.multi_hot(labels)
        image_weights, label_weights = weights[:, None, None, None], weights[:, None]
        return (
            image_weights * pixels[own] + (1 - image_weights) * pixels[partner],
            label_weights * hot[own] + (1 - label_weights) * hot[partner],
        )

    def _load(self, positions: Sequence[int], bad_samples: list[BadSample]) -> tuple[list[np.ndarray], list[Label]]:
        indices = self.order.indices(np.array(positions)).tolist()
        samples = self.images.source.read_many(indices)
        pictures, labels = [], []
        for position, index, sample in zip(positions, indices, samples, strict=True):
            pixels, label = self._load_or_replace(position, index, sample, bad_samples)
            pictures.append(pixels)
            labels.append(label)
        return pictures, labels

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
class EvalBatches(Dataset[Prepared]):
    """Batch number n of one rank's share of an evaluation: every image once, then padding."""

    images: Images
    batch: int
    rank: int
    world_size: int

    def __len__(self) -> int:
        return -(-len(self.images.source) // (self.batch * self.world_size))

    def __getitem__(self, number: int) -> Prepared:
        bad_samples: list[BadSample] = []
        first = (number * self.world_size + self.rank) * self.batch
        indices = range(first, min(first + self.batch, len(self.images.source)))
        size = self.images.image_size
        pictures = [np.zeros((size, size), dtype=np.uint8)] * self.batch
        labels: list[Label] = [[] if self.images.source.multi_label else 0] * self.batch
        is_real = torch.zeros(self.batch, dtype=torch.bool)
        try:
            for i, (index, sample) in enumerate(zip(indices, self.images.source.read_many(indices), strict=True)):
                loaded = self.images.prepare(sample, augmentation_rng(0, index), index)
                if isinstance(loaded, BadSample):
                    bad_samples.append(loaded)
                else:
                    pictures[i], labels[i] = loaded
                    is_real[i] = True
        except (UserError, StorageError) as error:
            return Prepared(bad_samples=bad_samples, error=error)
        positions = [*indices, *[-1] * (self.batch - len(indices))]
        batch = Batch(torch.from_numpy(self.images.stack(pictures)), self.images.labels(labels), positions, is_real)
        return Prepared(batch, bad_samples)


def mixup_weight(seed: int, step: int, p: float) -> float:
    """max(a, 1 − a) in [½, 1] for the step's a ~ Beta(p, p)."""
    a = mixup_rng(seed, step).beta(p, p)
    return max(a, 1 - a)
