"""Which classes are mistaken for which, and how well each class, or each class's ranking, does.

A full matrix of counts would be C² numbers, 3.5 GB at JFT's 29,593 classes. Only pairs that occur are kept: never more than
there are labels of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vitds import dist
from vitds.evaluation.classification import TOPS

COMPACT = 2**20
"""Pairs that wait at most before equal ones are put together."""
RANKING_BYTES = 2 * 2**30
"""Of scores and labels that one rank keeps for the average precision; 50,000 images of 8,000 classes."""


@dataclass(frozen=True)
class Mistake:
    """Images of one class of which another was thought best."""

    label: int
    predicted: int
    images: int


class Confusion:
    """Counts by class and by pair of classes.

    An image with several labels counts for each of them. Where its best prediction is one of them it is right, for all of
    them; else each of them is mistaken for the prediction.
    """

    def __init__(self, num_classes: int, tops: Sequence[int] = TOPS) -> None:
        self.num_classes, self.tops = num_classes, tuple(tops)
        self.images = np.zeros(num_classes, np.int64)
        """By class (C,)."""
        self.right = np.zeros((len(self.tops), num_classes), np.int64)
        """For each of `tops`, images of the class with a right label among so many best (K, C)."""
        self._pairs = np.zeros((2, 0), np.int64)
        self._waiting: list[np.ndarray] = []

    def add(self, logits: torch.Tensor, best: torch.Tensor, positive: torch.Tensor) -> None:
        """See `vitds.evaluation.classification.Witness`."""
        rows, labels = (index.cpu().numpy() for index in positive.nonzero(as_tuple=True))
        hits = (positive.gather(1, best) > 0).cpu().numpy()  # (B, K)
        self.images += np.bincount(labels, minlength=self.num_classes)
        for i, k in enumerate(self.tops):
            right = np.asarray(hits[:, :k].any(axis=1))  # (B,)
            self.right[i] += np.bincount(labels[right[rows]], minlength=self.num_classes)
        predicted = np.where(hits[rows, 0], labels, best[:, 0].cpu().numpy()[rows])
        self._waiting.append(labels * self.num_classes + predicted)
        if sum(map(len, self._waiting)) > COMPACT:
            self._compact()

    def share(self) -> None:
        """Every rank has all ranks' counts from here on. Collective, once."""
        self._compact()
        parts = dist.all_objects((self.images, self.right, self._pairs))
        self.images = np.sum([part[0] for part in parts], axis=0)
        self.right = np.sum([part[1] for part in parts], axis=0)
        self._pairs = _added(np.concatenate([part[2] for part in parts], axis=1))

    @property
    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(labels, predictions, images), each (P,) int64: the pairs that occurred, right ones among them, by label."""
        self._compact()
        labels, predicted = np.divmod(self._pairs[0], self.num_classes)
        return labels, predicted, self._pairs[1]

    def worst(self, number: int | None = None) -> list[Mistake]:
        """Pairs of different classes, those with most images first; of equally many, by label."""
        labels, predicted, images = self.pairs
        wrong = np.flatnonzero(labels != predicted)
        ordered = wrong[np.argsort(-images[wrong], kind="stable")][:number]
        return [Mistake(int(labels[i]), int(predicted[i]), int(images[i])) for i in ordered]

    def most_confused(self) -> dict[int, Mistake]:
        """By class, for what it is mistaken most often; classes that never are, are left out."""
        found: dict[int, Mistake] = {}
        for mistake in self.worst():
            found.setdefault(mistake.label, mistake)
        return found

    def _compact(self) -> None:
        if self._waiting:
            fresh = np.concatenate(self._waiting)
            self._waiting = []
            self._pairs = _added(np.concatenate([self._pairs, [fresh, np.ones_like(fresh)]], axis=1))


def _added(pairs: np.ndarray) -> np.ndarray:
    """(2, P) of keys and counts, each key once, in order."""
    keys, places = np.unique(pairs[0], return_inverse=True)
    counts = np.zeros(len(keys), np.int64)
    np.add.at(counts, places, pairs[1])
    return np.stack([keys, counts])


class Ranking:
    """Keeps scores and labels, of which the mean average precision comes."""

    def __init__(self) -> None:
        self._scores: list[np.ndarray] = []
        self._positive: list[np.ndarray] = []
        self._bytes = 0

    def add(self, logits: torch.Tensor, best: torch.Tensor, positive: torch.Tensor) -> None:
        """See `vitds.evaluation.classification.Witness`."""
        self._bytes += 5 * logits.numel()
        if self._bytes > RANKING_BYTES:
            self._scores, self._positive = [], []
            return
        self._scores.append(logits.cpu().numpy())
        self._positive.append((positive > 0).cpu().numpy())

    def mean_average_precision(self, at_once: int = 256) -> tuple[float, int] | None:
        """(mean over classes of `average_precision`, number of those classes): all that have an image. None where scores
        were too many to keep, or no class has an image. Collective.

        Args:
            at_once: classes that are looked at together.
        """
        if dist.any_rank([self._bytes > RANKING_BYTES])[0]:
            return None
        own = (np.concatenate(self._scores), np.concatenate(self._positive)) if self._scores else None
        classes = max(dist.all_objects(0 if own is None else own[0].shape[1]))
        found: list[float] = []
        for first in range(0, classes, at_once):
            part = slice(first, first + at_once)
            parts = dist.all_objects(None if own is None else (own[0][:, part], own[1][:, part]))
            scores, positive = (np.concatenate([one[i] for one in parts if one is not None]) for i in range(2))
            found += [average_precision(scores[:, i], positive[:, i]) for i in np.flatnonzero(positive.any(axis=0))]
        return (float(np.mean(found)), len(found)) if found else None


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Σₙ (Rₙ − Rₙ₋₁)·Pₙ over the thresholds, which are the scores that occur, from the largest down.

    Images of one score come in together, so that their order does not matter; nothing is interpolated.

    Args:
        scores: (N,).
        positive: bool (N,), at least one of them.
    """
    order = np.argsort(-scores, kind="stable")
    ordered, hits = scores[order], np.cumsum(positive[order])
    ends = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)  # the last image of each score
    precision, recall = hits[ends] / (ends + 1), hits[ends] / hits[-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))
