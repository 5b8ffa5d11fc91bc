"""All that a training run measures of its model now and then, with the weights and, where there is one, their average."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from vitds.data import BadSamples, DataSection, EvalLoader, Sources
from vitds.data.sources import Role
from vitds.evaluation.classification import evaluate
from vitds.evaluation.fewshot import FewShot
from vitds.evaluation.probe_sets import FewshotSection, ProbeSet
from vitds.lengths import Lengths

Weights = Iterable[tuple[str, AbstractContextManager[None]]]


class Evaluations:
    """Made once on all ranks, before the loop.

    Args:
        engine: trains; its weights are evaluated as they are.
        sources: those that there are of eval and minival are classified (eval/…, minival/…).
        sets: the few-shot sets (fewshot/…).
        data, fewshot: the sections.
        every: says what is due.
        weights: of each of the weights that are to be evaluated, what the first word of its metrics' names ends with, and
            a context in which they are the engine's.
        during: entered with a word around each kind of measurement (vitds.cluster.Watch.during).
        loss: name in LOSSES.
        bad: of the run.
        batch, image_size, num_classes, rank, world_size: as EvalLoader's.
    """

    def __init__(
        self,
        engine: Any,
        sources: Sources,
        sets: Sequence[ProbeSet],
        data: DataSection,
        fewshot: FewshotSection,
        every: Lengths,
        weights: Callable[[], Weights],
        during: Callable[[str], AbstractContextManager[Any]],
        *,
        loss: str,
        num_classes: int,
        bad: BadSamples,
        **shared: int,
    ) -> None:
        self._engine, self._loss, self._bad = engine, loss, bad
        self._every, self._weights, self._during = every, weights, during
        named: dict[str, Any] = {"num_classes": num_classes, "bad": bad, **shared}
        self._loaders: dict[Role, EvalLoader] = {}
        if sources.eval is not None:
            self._loaders["eval"] = EvalLoader(sources.eval, data, **named)
        if sources.minival is not None:
            self._loaders["minival"] = EvalLoader(sources.minival, data, role="minival", **named)
        self._probe = FewShot(engine, sets, fewshot.shots, fewshot.l2, data, **shared) if sets else None
        self.remarks = "\n".join(filter(None, [one.remark for one in sets]))
        """What is uncommon about the few-shot sets."""

    def measure(self, progress: Any, between: Callable[[], None]) -> dict[str, float]:
        """What is due after `progress.step` updates and has not been measured there yet; what it finds is `progress.evaluation`
        from then on. Collective; every rank returns the same, but for seconds.

        Args:
            progress: of the run (vitds.checkpoint.progress).
            between: called before each batch, equally often on every rank; may end it by raising on all.

        Returns:
            What is found, and what it cost: unusable images, seconds of the probe. Nothing where nothing is due.
        """
        step, every = progress.step, self._every
        loaders = self._loaders if every.due(every.evaluate, step) else {}
        probe = self._probe if every.due(every.probe, step) else None
        if progress.evaluated == step or not (loaders or probe):
            return {}
        found, costs = dict[str, float](), dict[str, float]()
        for suffix, exchanged in self._weights():
            with exchanged:
                for name, loader in loaders.items():
                    with self._during("evaluation" if name == "eval" else name):
                        found |= evaluate(self._engine, loader, self._loss, between, name + suffix)
                if probe is not None:
                    started = time.perf_counter()
                    with self._during("few-shot probe"):
                        found |= probe.measure(between, "fewshot" + suffix)
                    costs["perf/fewshot_seconds"] = (
                        costs.get("perf/fewshot_seconds", 0.0) + time.perf_counter() - started
                    )
        for name in loaders:
            costs |= self._bad.row(name)
        progress.evaluation, progress.evaluated = found, step
        return found | costs
