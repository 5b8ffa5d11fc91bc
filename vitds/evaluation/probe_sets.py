"""What a few-shot probe is drawn from: sets of images by name, and which few of each class are learnt.

For each seed, `numpy.random.default_rng(seed)` permutes the images of class 0, then those of class 1, …; k shots are the first k
of each class, so that more shots contain fewer. A class that has fewer images gives all it has; where none has as many,
there is nothing to measure, and that is refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitds.data import Source, SourceSection, build_source
from vitds.data.minival import Part
from vitds.data.samples import Images
from vitds.data.transforms import Transform, build_transforms
from vitds.errors import UserError
from vitds.sections import Duration, check_least, key

NAMED = 3
"""Classes that are named in one message."""


@dataclass(frozen=True)
class ProbeSetSection:
    """A set of labelled images to probe with; one label each, and classes that need not be the model's."""

    train: SourceSection = key(doc="Of which a few images per class are learnt.")
    test: SourceSection = key(doc="On which accuracy is measured; its classes are numbered as those of train.")


@dataclass(frozen=True)
class FewshotSection:
    """The few-shot linear probe inside training: fewshot/<set>_<k>shot, the mean over seeds, and each seed's own."""

    every: Duration = key(Duration(10_000), "Interval of the probe; 0 probes at the end only.")
    sets: dict[str, ProbeSetSection] = key({}, "By name; none, no probe.")
    shots: list[int] = key([1, 5, 10, 25], "Images per class that are learnt.")
    seeds: int = key(3, "So many draws of them, of the seeds 0, 1, ….")
    l2: float = key(1024.0, "Weight of the squared weights, added to XᵀX.")

    def __post_init__(self) -> None:
        check_least("vitds.fewshot", self, seeds=1)
        check_probe(self.shots, self.l2, "vitds.fewshot")
        for name in self.sets:
            if not re.fullmatch(r"[\w.-]+", name):
                raise UserError(
                    f"vitds.fewshot.sets: {name!r} is part of metrics' names: letters, digits, '_', '.' and '-'"
                )


def check_probe(shots: Sequence[int], l2: float, place: str) -> None:
    """Refuses numbers of images below 1 or given twice, and an l2 that leaves the equations without a solution."""
    if not shots or min(shots) < 1 or len(set(shots)) < len(shots):
        raise UserError(f"{place}.shots: expected different whole numbers ≥ 1, found {list(shots)}")
    if not l2 > 0:
        raise UserError(f"{place}.l2: expected a number above 0, found {l2}")


@dataclass(frozen=True)
class ProbeSet:
    """A set, drawn from: all that is known before any image is looked at."""

    name: str
    said: tuple[str, str]
    """How the user has named the images to learn and those to test on, for messages."""
    train: Source
    """Those images alone that are in some draw."""
    test: Source
    transforms: tuple[Sequence[Transform], Sequence[Transform]]
    """Of train and of test."""
    places: np.ndarray
    """int64 (seeds, len(train)): `draw` of each seed."""
    num_classes: int
    remark: str
    """What is uncommon about it, in words; "" if nothing."""


def open_sets(section: FewshotSection, image_size: int) -> list[ProbeSet]:
    """The sets of a run file, drawn.

    Raises:
        UserError: images that are not there, several labels an image, no class with as many images as the most shots,
            classes of train and test that are not the same.
    """
    return [
        open_set(name, f"vitds.fewshot.sets.{name}", one, section.shots, section.seeds, image_size)
        for name, one in section.sets.items()
    ]


def open_set(
    name: str, place: str, section: ProbeSetSection, shots: Sequence[int], seeds: int, image_size: int
) -> ProbeSet:
    """As `open_sets`, of one."""
    said = (f"{place}.train", f"{place}.test")
    try:
        train, test = build_source(section.train, "train"), build_source(section.test, "eval")
        learnt, tested = (
            build_transforms(
                squash(image_size) if one.transforms is None else one.transforms, image_size, f"{where}.transforms"
            )
            for one, where in zip((section.train, section.test), said, strict=True)
        )
    except UserError as error:
        raise UserError(_renamed(str(error), said)) from None
    return draw_set(name, said, train, test, (learnt, tested), shots, seeds, image_size)


def squash(image_size: int) -> list[Any]:
    """The recipe's transforms: the whole image to a square of 256/224 of the model's size, whatever its aspect ratio, then the
    centre. (Pillow's antialiased bilinear as everywhere here; the reference resizes without antialias.)"""
    return [{"resize": {"size": round(image_size * 256 / 224)}}, "central_crop"]


def draw_set(
    name: str,
    said: tuple[str, str],
    train: Source,
    test: Source,
    transforms: tuple[Sequence[Transform], Sequence[Transform]],
    shots: Sequence[int],
    seeds: int,
    image_size: int,
) -> ProbeSet:
    """As `open_sets`, of one whose sources are open. One image of each is prepared: a probe comes late in a run."""
    for where, source in zip(said, (train, test), strict=True):
        if source.multi_label:
            raise UserError(f"{where}: its images have several labels each; a probe learns one class an image")
    if list(train.class_names) != list(test.class_names) and train.class_names and test.class_names:
        only = sorted(set(train.class_names) ^ set(test.class_names))
        raise UserError(
            f"{said[0]} and {said[1]} number their classes differently: {len(train.class_names)} and "
            f"{len(test.class_names)}" + (f"; only in one of them: {', '.join(only[:NAMED])}" if only else "")
        )
    labels, test_labels = train.all_labels(), test.all_labels()
    names = list(train.class_names or test.class_names)
    num_classes = max(len(names), int(labels.max(initial=-1)) + 1, int(test_labels.max(initial=-1)) + 1)
    counts = np.bincount(labels[labels >= 0], minlength=num_classes)
    tested = np.bincount(test_labels[test_labels >= 0], minlength=num_classes)
    if not tested.any():
        raise UserError(f"{said[1]}: no image with a label")
    most, largest = max(shots), counts.max(initial=0)
    if largest < most:
        raise UserError(
            f"{said[0]}: {most} shots, but the largest of its {num_classes} classes has {largest} images; ask for fewer shots"
        )
    places = np.stack([draw(labels, seed, most, num_classes) for seed in range(seeds)])
    drawn = np.flatnonzero((places >= 0).any(axis=0))
    for where, source, steps in zip(said, (Part(train, drawn), test), transforms, strict=True):
        try:
            Images(source, steps, "eval", image_size, num_classes, 0).prepare(
                source.read(0), np.random.default_rng(0), 0
            )
        except UserError as error:
            raise UserError(str(error).replace("vitds.data.eval", where)) from None
    remark = _remark(said[0], counts, tested, most, names)
    return ProbeSet(name, said, Part(train, drawn), test, transforms, places[:, drawn], num_classes, remark)


def draw(labels: np.ndarray, seed: int, most: int, num_classes: int) -> np.ndarray:
    """For each image its place among those of its class that are drawn, int64 (N,); −1 from `most` on, and without a class.

    Args:
        labels: int64 (N,), −1: none.
        seed: of numpy's default_rng, which permutes class after class.
        most: images per class.
        num_classes: C.
    """
    rng = np.random.default_rng(seed)
    places = np.full(len(labels), -1, dtype=np.int64)
    by_class = np.argsort(labels, kind="stable")
    ends = np.searchsorted(labels[by_class], np.arange(num_classes + 1))
    for start, end in itertools.pairwise(ends):
        chosen = rng.permutation(by_class[start:end])[:most]
        places[chosen] = np.arange(len(chosen))
    return places


def _renamed(message: str, said: tuple[str, str]) -> str:
    """What a source says of the run file's images, as said of a set's."""
    return message.replace("vitds.data.train", said[0]).replace("vitds.data.eval", said[1])


def _remark(said: str, counts: np.ndarray, tested: np.ndarray, most: int, names: Sequence[str]) -> str:
    """What is said of classes (C,) with fewer images than shots, and of those that are tested and not learnt."""
    small, unknown = np.flatnonzero((counts < most) & (counts > 0)), np.flatnonzero((counts == 0) & (tested > 0))
    parts = []
    if len(small):
        listed = ", ".join(f"{_named(names, c)} has {counts[c]}" for c in small[:NAMED].tolist())
        parts.append(f"{len(small)} classes have fewer than {most} images and give all they have: {listed}")
    if len(unknown):
        listed = ", ".join(_named(names, c) for c in unknown[:NAMED].tolist())
        parts.append(f"{len(unknown)} classes are tested and have no image to learn from: {listed}")
    return f"{said}: {'; '.join(parts)}" if parts else ""


def _named(names: Sequence[str], number: int) -> str:
    return repr(names[number]) if number < len(names) else f"class {number}"
