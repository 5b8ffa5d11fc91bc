"""Which image stands at which position of the training stream: a pure function of (seed, position), nothing stored.

Position p lies in epoch p // num_images, and every epoch is a permutation of all images of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vitds.data.permutation import all_permuted, permuted

if TYPE_CHECKING:
    from vitds.data.section import OrderSection


class Order(Protocol):
    """Which image stands at which position; a value, handed to worker processes."""

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Indices in [0, num_images), int64 (P,), of the images at `positions` in [0, 2**62], int64 (P,)."""


def build_order(section: OrderSection, seed: int, num_images: int) -> Order:
    """The order that the run file asks for, over `num_images` ≥ 1."""
    assert num_images > 0, num_images
    if section.kind == "full":
        return FullOrder(seed, num_images)
    return WindowedOrder(seed, num_images, section.run_images, section.block_images, section.window_blocks)


@dataclass(frozen=True)
class FullOrder:
    """Any image may follow any other."""

    seed: int
    num_images: int

    def indices(self, positions: np.ndarray) -> np.ndarray:
        indices, epochs = _within_epochs(positions, self.num_images)
        for epoch, here in _groups(epochs):
            indices[here] = all_permuted(_full_name(self.seed, epoch), indices[here], self.num_images)
        return indices


@dataclass(frozen=True)
class WindowedOrder:
    """Neighbours in storage are visited close together, and mixed with images from anywhere.

    The images as they lie in storage are cut into runs of `run_images`, and the runs into blocks of `block_images`. Each
    epoch puts the blocks into another order, gathers up to `window_blocks` that follow each other in it into a window,
    and mixes the runs of each window; a run's images come one after another. So a window reads from that many places,
    each a block long, in pieces of a run.

    The cuts fall elsewhere each epoch: storage is taken as a ring, and its beginning moved to an image drawn at random.
    It is this that allows a closed form without unfairness: the last block and the last run, which may be short, keep
    their places at the end of the epoch, but which images they hold is random. Windows of an epoch differ by at most one
    block, else the last could be of few images and hardly mixed.
    """

    seed: int
    num_images: int
    run_images: int
    block_images: int
    window_blocks: int

    def indices(self, positions: np.ndarray) -> np.ndarray:
        indices, epochs = _within_epochs(positions, self.num_images)
        for epoch, here in _groups(epochs):
            indices[here] = self._of_epoch(epoch, indices[here])
        return indices

    def _of_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Indices of the images that come at these places in [0, num_images) of an epoch."""
        name = f"{self.seed}/{epoch}"
        runs_of_block = self.block_images // self.run_images
        whole_blocks = self.num_images // self.block_images
        runs, within_run = np.divmod(places, self.run_images)
        for window, here in _groups(self._windows(runs // runs_of_block)):
            start, end = (edge * runs_of_block for edge in self._blocks_of(window))
            whole_runs = min(end, self.num_images // self.run_images) - start  # the short run, if any, is the very last
            mine = here[runs[here] - start < whole_runs]
            runs[mine] = start + all_permuted(f"runs/{name}/{window}", runs[mine] - start, whole_runs)
        blocks, within_block = np.divmod(runs, runs_of_block)
        whole = np.flatnonzero(blocks < whole_blocks)
        blocks[whole] = all_permuted(f"blocks/{name}", blocks[whole], whole_blocks)
        stored = blocks * self.block_images + within_block * self.run_images + within_run
        return (stored + _draw(f"rotation/{name}", self.num_images)) % self.num_images

    def _windows(self, blocks: np.ndarray) -> np.ndarray:
        """The window to which each of these blocks, counted in the epoch's order, belongs."""
        size, longer = self._window_sizes()
        return np.where(blocks < longer * (size + 1), blocks // (size + 1), (blocks - longer) // size)

    def _blocks_of(self, window: int) -> tuple[int, int]:
        """[start, end) of the blocks of a window, counted in the epoch's order."""
        size, longer = self._window_sizes()
        return window * size + min(window, longer), (window + 1) * size + min(window + 1, longer)

    def _window_sizes(self) -> tuple[int, int]:
        """(n, m): windows hold n blocks each, the first m of them one more."""
        blocks = -(-self.num_images // self.block_images)
        return divmod(blocks, -(-blocks // self.window_blocks))


def order(seed: int, position: int, num_images: int) -> int:
    """The index that `FullOrder` gives for one position, by Python's whole numbers."""
    epoch, place = divmod(position, num_images)
    return permuted(_full_name(seed, epoch), place, num_images)


def _full_name(seed: int, epoch: int) -> str:
    return f"order/{seed}/{epoch}"


def _within_epochs(positions: np.ndarray, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Where in its epoch each position lies, and which epoch that is."""
    epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), num_images)
    return places, epochs


def _groups(numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each number that occurs in (P,), with where it does."""
    for number in np.unique(numbers).tolist():
        yield number, np.flatnonzero(numbers == number)


def _draw(name: str, size: int) -> int:
    """A number in [0, size), pseudo-random by its name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little") % size
