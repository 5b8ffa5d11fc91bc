"""The few-shot probe: how well a linear classifier on frozen features does with a few images per class.

As the paper measures it (10-shot ImageNet and six smaller sets): images squashed to 256/224 of the model's size, central
crop, features in front of the classifier, least squares (vitds/evaluation/ridge.py) on a few images of each class
(vitds/evaluation/probe_sets.py), accuracy on all test images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vitds import dist
from vitds.data import BadSamples, DataSection, EvalLoader, TooManyBad
from vitds.errors import UserError
from vitds.evaluation.features import Features, collected
from vitds.evaluation.probe_sets import ProbeSet
from vitds.evaluation.ridge import NoSolution, Rows, refuse_not_finite, solve
from vitds.json_files import say

NAMED = 3
"""Images that are named in one message."""


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
        every rank returns the same ones. Where there is no solution they are NaN, and why is said.

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
            except NoSolution as error:
                if dist.is_main():
                    say(f"vitds: {error}")
                right = {k: [float("nan")] * len(one.places) for k in self._shots}
            for k in self._shots:
                name = f"{prefix}/{one.name}_{k}shot"
                found[name] = sum(right[k]) / len(right[k])
                found |= {f"{name}_seed{seed}": accuracy for seed, accuracy in enumerate(right[k])}
        return found

    def accuracies(self, one: ProbeSet, between: Callable[[], None]) -> dict[int, list[float]]:
        """By shots and seed, the share of the test images that get their class.

        Raises:
            NoSolution: features that are not finite, or an l2 too small for them; the set is named.
            TooManyBad: as `measure`.
        """
        learnt, tested = (self._features(one, role, between) for role in (0, 1))
        for where, part in ((one.said[1], tested), (one.said[0], learnt)):
            refuse_not_finite(part.features, where)
        engine, right = self._engine, {k: list[int]() for k in self._shots}
        for places in one.places:
            own = torch.from_numpy(places)[learnt.indices]
            rows = Rows(learnt.features[own >= 0], learnt.labels[own >= 0], own[own >= 0])
            try:
                for k, probe in solve(rows, self._shots, one.num_classes, self._l2, engine.device, between):
                    right[k].append(probe.count_right(tested.features, tested.labels))
            except NoSolution as error:
                error.args = (f"{one.said[0]}: {error}",)
                raise
        counts = torch.tensor([*right.values(), [len(tested.labels)] * len(one.places)], dtype=torch.float64)
        *by_shots, total = dist.sum_over_ranks(counts.to(engine.device)).cpu()
        return {k: (row / total).tolist() for k, row in zip(right, by_shots, strict=True)}

    def _features(self, one: ProbeSet, role: int, between: Callable[[], None]) -> Features:
        """This rank's features of train (0) or test (1), in host memory."""
        bad = BadSamples(self._data.max_bad_samples)
        given = {"num_classes": one.num_classes, "bad": bad, "transforms": one.transforms[role], **self._shared}
        try:
            loader = EvalLoader((one.train, one.test)[role], self._data, **given)
            found = collected(self._engine, loader, between)
        except UserError as error:
            error.args = (str(error).replace("vitds.data.eval", one.said[role]),)
            raise
        self._check_bad([(one.key, one.reason) for one in bad.found("eval")], bad.cap, one.said[role])
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
