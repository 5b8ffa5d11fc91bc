"""The few-shot probe: how well a linear classifier on frozen features does with a few images per class.

As the paper measures it (10-shot ImageNet and six smaller sets): images squashed to 256/224 of the model's size, central
crop, features in front of the classifier, least squares (vitds/evaluation/ridge.py), accuracy on all test images. For
each seed, `numpy.random.default_rng(seed)` permutes the images of class 0, then those of class 1, …; k shots are the first k
of each class, so that more shots contain fewer. A class that has fewer images gives all it has.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vitds import dist
from vitds.data import BadSamples, DataSection, EvalLoader, Source, SourceSection, TooManyBad, build_source
from vitds.data.minival import Part
from vitds.data.transforms import check_transforms
from vitds.errors import UserError
from vitds.evaluation.features import Features, collected
from vitds.evaluation.ridge import NotFinite, Rows, refuse_not_finite, solve
from vitds.json_files import say
from vitds.sections import Duration, check_least, key

NAMED = 3
"""Classes or images that are named in one message."""


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
    place: str
    """How the user has named it, for messages."""
    train: Source
    """Those images alone that are in some draw."""
    test: Source
    prepared: tuple[SourceSection, SourceSection]
    """What is done to the images of train and of test."""
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
    try:
        train, test = build_source(section.train, "train"), build_source(section.test, "eval")
    except UserError as error:
        raise UserError(_renamed(str(error), place)) from None
    return draw_set(name, place, train, test, section, shots, seeds, image_size)


def draw_set(
    name: str,
    place: str,
    train: Source,
    test: Source,
    section: ProbeSetSection,
    shots: Sequence[int],
    seeds: int,
    image_size: int,
) -> ProbeSet:
    """As `open_sets`, of one whose sources are open."""
    for role, source in (("train", train), ("test", test)):
        if source.multi_label:
            raise UserError(f"{place}.{role}: its images have several labels each; a probe learns one class an image")
    if list(train.class_names) != list(test.class_names) and train.class_names and test.class_names:
        only = sorted(set(train.class_names) ^ set(test.class_names))
        raise UserError(
            f"{place}: train and test number their classes differently: {len(train.class_names)} and "
            f"{len(test.class_names)}" + (f"; only in one of them: {', '.join(only[:NAMED])}" if only else "")
        )
    labels, test_labels = train.all_labels(), test.all_labels()
    names = list(train.class_names or test.class_names)
    num_classes = max(len(names), int(labels.max(initial=-1)) + 1, int(test_labels.max(initial=-1)) + 1)
    counts = np.bincount(labels[labels >= 0], minlength=num_classes)
    tested = np.bincount(test_labels[test_labels >= 0], minlength=num_classes)
    if not tested.any():
        raise UserError(f"{place}.test: no image with a label")
    most = max(shots)
    if counts.max(initial=0) < most:
        raise UserError(
            f"{place}.train: {most} shots, but the largest of its {num_classes} classes has {counts.max(initial=0)} images; "
            f"ask for at most as many shots"
        )
    places = np.stack([draw(labels, seed, most, num_classes) for seed in range(seeds)])
    drawn = np.flatnonzero((places >= 0).any(axis=0))
    default: list[Any] = [{"resize": {"size": round(image_size * 256 / 224)}}, "central_crop"]
    prepared = [
        one if one.transforms is not None else replace(one, transforms=default) for one in (section.train, section.test)
    ]
    for role, one in zip(("train", "test"), prepared, strict=True):
        check_transforms(one.transforms or [], f"{place}.{role}.transforms")
    return ProbeSet(
        name, place, Part(train, drawn), test, (prepared[0], prepared[1]), places[:, drawn], num_classes,
        _remark(place, counts, tested, most, names),
    )  # fmt: skip


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


class FewShot:
    """The probes of all sets, with one engine. Made and used on all ranks together.

    Args:
        engine: as `features` wants it.
        sets: drawn; the same on every rank.
        shots, l2: as in FewshotSection.
        data: workers, and how many images may be unusable.
        batch: images of a rank at a time.
        image_size: S.
        rank, world_size: of this process.
    """

    def __init__(
        self,
        engine: Any,
        sets: Sequence[ProbeSet],
        shots: Sequence[int],
        l2: float,
        data: DataSection,
        *,
        batch: int,
        image_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._engine, self._sets, self._shots, self._l2, self._data = engine, sets, shots, l2, data
        self._shared: dict[str, Any] = {
            "batch": batch,
            "image_size": image_size,
            "rank": rank,
            "world_size": world_size,
        }
        self._told: set[str] = set()

    def measure(self, between: Callable[[], None], prefix: str = "fewshot") -> dict[str, float]:
        """Accuracies as fractions: prefix/<set>_<k>shot, the mean over seeds, and prefix/<set>_<k>shot_seed<s>. Collective;
        every rank returns the same ones. Where features are not finite they are NaN, which is said.

        Args:
            between: as for `features`, and called before each solution.
            prefix: of the names.

        Raises:
            TooManyBad: more images of a set cannot be used than the run file allows.
        """
        found: dict[str, float] = {}
        for one in self._sets:
            try:
                right = self.accuracies(one, between)
            except NotFinite as error:
                if dist.is_main():
                    say(f"vitds: {one.place}: {error}")
                right = {k: [float("nan")] * len(one.places) for k in self._shots}
            for k in self._shots:
                name = f"{prefix}/{one.name}_{k}shot"
                found[name] = sum(right[k]) / len(right[k])
                found |= {f"{name}_seed{seed}": accuracy for seed, accuracy in enumerate(right[k])}
        return found

    def accuracies(self, one: ProbeSet, between: Callable[[], None]) -> dict[int, list[float]]:
        """By shots and seed, the share of the test images that get their class.

        Raises:
            NotFinite: features that are not finite.
            TooManyBad: as `measure`.
        """
        learnt, tested = (self._features(one, role, between) for role in ("train", "test"))
        refuse_not_finite(tested.features)
        engine, right = self._engine, {k: list[int]() for k in self._shots}
        for places in one.places:
            own = torch.from_numpy(places)[learnt.indices]
            rows = Rows(learnt.features[own >= 0], learnt.labels[own >= 0], own[own >= 0])
            for k, probe in solve(rows, self._shots, one.num_classes, self._l2, engine.device, between):
                right[k].append(probe.count_right(tested.features, tested.labels))
        counts = torch.tensor([*right.values(), [len(tested.labels)] * len(one.places)], dtype=torch.float64)
        *by_shots, total = dist.sum_over_ranks(counts.to(engine.device)).cpu()
        return {k: (row / total).tolist() for k, row in zip(right, by_shots, strict=True)}

    def _features(self, one: ProbeSet, role: str, between: Callable[[], None]) -> Features:
        """This rank's features of train or test, in host memory."""
        place, source = f"{one.place}.{role}", one.train if role == "train" else one.test
        section = replace(self._data, eval=one.prepared[role == "test"])
        try:
            bad = BadSamples(section.max_bad_samples)
            loader = EvalLoader(source, section, num_classes=one.num_classes, bad=bad, **self._shared)
            found = collected(self._engine, loader, between)
        except UserError as error:
            error.args = (str(error).replace("vitds.data.eval", place),)
            raise
        self._check_bad([(one.key, one.reason) for one in bad.found("eval")], section.max_bad_samples, place)
        return found

    def _check_bad(self, met: list[tuple[str, str]], cap: int, place: str) -> None:
        """Say which images all ranks have left out, each once. Collective."""
        bad = dict(sample for samples in dist.all_objects(met) for sample in samples)
        named = "; ".join(f"{key} ({reason})" for key, reason in list(bad.items())[:NAMED])
        what = f"{place}: {len(bad)} images cannot be used: {named}" + ("; …" if len(bad) > NAMED else "")
        if len(bad) > cap:
            raise TooManyBad(f"{what}; vitds.data.max_bad_samples is {cap}")
        if bad and what not in self._told and dist.is_main():
            say(f"vitds: {what}; they are left out")
        self._told.add(what)


def _renamed(message: str, place: str) -> str:
    """What a source says of the run file's images, as said of a set's."""
    return message.replace("vitds.data.train", f"{place}.train").replace("vitds.data.eval", f"{place}.test")


def _remark(place: str, counts: np.ndarray, tested: np.ndarray, most: int, names: Sequence[str]) -> str:
    """Of classes (C,) with fewer images than shots, and of those that are tested and not learnt."""
    small, unknown = np.flatnonzero((counts < most) & (counts > 0)), np.flatnonzero((counts == 0) & (tested > 0))
    said = []
    if len(small):
        listed = ", ".join(f"{_named(names, c)} has {counts[c]}" for c in small[:NAMED].tolist())
        said.append(f"{len(small)} classes have fewer than {most} images and give all they have: {listed}")
    if len(unknown):
        listed = ", ".join(_named(names, c) for c in unknown[:NAMED].tolist())
        said.append(f"{len(unknown)} classes are tested and have no image to learn from: {listed}")
    return f"{place}.train: {'; '.join(said)}" if said else ""


def _named(names: Sequence[str], number: int) -> str:
    return repr(names[number]) if number < len(names) else f"class {number}"
