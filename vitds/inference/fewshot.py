"""`vitds fewshot`: a few-shot linear probe of a trained model, as the run file's vitds.fewshot measures it in training."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from vitds import dist
from vitds.data import DataSection, SourceSection
from vitds.data.transforms import build_transforms
from vitds.data_verbs.arguments import at_least_one, different_numbers
from vitds.errors import UserError
from vitds.evaluation.fewshot import FewShot
from vitds.evaluation.probe_sets import FewshotSection, ProbeSet, check_probe, draw_set, open_sets, squash
from vitds.inference.images import WHAT, add_loading, image_set
from vitds.inference.opening import Session, add_opening, opened
from vitds.json_files import finite, say
from vitds.progress import Progress

STANDARD = FewshotSection()


def add_verb(verbs: Any) -> None:
    """Add `fewshot` to the parser's verbs."""
    summary = "measure how well a linear classifier on a model's features does with a few images per class"
    parser = verbs.add_parser("fewshot", help=summary, description=summary)
    add_opening(parser)
    parser.add_argument("--train", metavar="WHAT", help=f"of which a few images per class are learnt: {WHAT}")
    parser.add_argument("--test", metavar="WHAT", help="on which accuracy is measured, likewise")
    parser.add_argument(
        "--config", metavar="RUN.json", help="in place of both: the sets, shots, seeds and l2 of a run file's vitds.fewshot"
    )  # fmt: skip
    parser.add_argument(
        "--shots", type=different_numbers, metavar="K,…", help="images per class; " + ",".join(map(str, STANDARD.shots))
    )
    parser.add_argument(
        "--seeds", type=at_least_one, metavar="N", help=f"draws, of the seeds 0, 1, …; {STANDARD.seeds}"
    )
    parser.add_argument("--l2", type=float, help=f"weight of the squared weights; {STANDARD.l2:g}")
    parser.add_argument(
        "--as-evaluated", action="store_true",
        help="prepare images as the model's image processor does, and not by squashing them to a square (needs --train)",
    )  # fmt: skip
    add_loading(parser)
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def run(options: argparse.Namespace, load: Callable[..., Any]) -> int:
    """Probe and print.

    Raises:
        UserError: a model or images that cannot be used, fewer images than shots, features that are not finite.
    """
    with opened(options) as session:
        section, sets = _sets(options, load, session)
        data = DataSection(
            SourceSection("synthetic"), num_workers=options.workers, max_bad_samples=options.max_bad_samples
        )
        shared = {"batch": options.batch, "image_size": session.config.image_size}
        shared |= {"rank": dist.rank(), "world_size": dist.world_size()}
        probe = FewShot(session, sets, section.shots, section.l2, data, **shared)
        found = []
        for one in sets:
            if one.remark and dist.is_main():
                say(f"vitds: {one.remark}")
            found.append(_probed(probe, one, section, options.batch * dist.world_size()))
        if dist.is_main():
            if options.json:
                about = {
                    "checkpoint": str(session.path),
                    "step": session.step,
                    "l2": section.l2,
                    "seeds": section.seeds,
                }
                results = {one.name: _row(one, right) for one, right in zip(sets, found, strict=True)}
                print(json.dumps(finite(about | {"sets": results}), indent=2, ensure_ascii=False))
            else:
                blocks = [str(session.path)]
                blocks += [_table(one, right) for one, right in zip(sets, found, strict=True)]
                print("\n\n".join(blocks))
    return 0


def _sets(
    options: argparse.Namespace, load: Callable[..., Any], session: Session
) -> tuple[FewshotSection, list[ProbeSet]]:
    """The numbers that count, and what is probed with them."""
    size = session.config.image_size
    if (options.config is None) == (options.train is None) or (options.train is None) != (options.test is None):
        raise UserError("give either --train and --test, or --config")
    base = STANDARD if options.config is None else load(options.config, [], world_size=None).vitds.fewshot
    told = {name: getattr(options, name) for name in ("shots", "seeds", "l2") if getattr(options, name) is not None}
    section = FewshotSection(**{**base.__dict__, **told})
    check_probe(section.shots, section.l2, "--shots/--l2")
    if options.config is not None:
        if options.as_evaluated:
            raise UserError("--as-evaluated: the run file's sets say by themselves how their images are prepared")
        if not section.sets:
            raise UserError(f"--config {options.config!r}: vitds.fewshot.sets names no set")
        return section, open_sets(section, size)
    train, test = image_set(options.train, load, "--train"), image_set(options.test, load, "--test")
    transforms: Sequence[Any] = (
        [session.processor.fitted] if options.as_evaluated else build_transforms(squash(size), size, "squash")
    )
    said = (f"--train {options.train}", f"--test {options.test}")
    name = f"{options.train} → {options.test}"
    sources = (train.source, test.source)
    return section, [draw_set(name, said, *sources, (transforms, transforms), section.shots, section.seeds, size)]


def _probed(probe: FewShot, one: ProbeSet, section: FewshotSection, at_once: int) -> dict[int, list[float]]:
    parts = sum(-(-len(source) // at_once) for source in (one.train, one.test)) + section.seeds * len(section.shots)
    with Progress(f"probing {one.name}", parts, "parts") if dist.is_main() else nullcontext() as progress:
        return probe.accuracies(one, lambda: None if progress is None else progress.add())


def _row(one: ProbeSet, right: dict[int, list[float]]) -> dict[str, Any]:
    return {
        "classes": one.num_classes,
        "test_images": len(one.test),
        "accuracy": {str(k): {"seeds": seeds, "mean": sum(seeds) / len(seeds)} for k, seeds in right.items()},
    }


def _table(one: ProbeSet, right: dict[int, list[float]]) -> str:
    """Accuracies by shots and seed, for a reader."""
    lines = [f"{one.name}: {one.num_classes} classes, {len(one.test):,} images to test on"]
    lines.append("shots" + "".join(f"{f'seed {seed}':>10}" for seed in range(len(one.places))) + f"{'mean':>10}")
    for k, seeds in right.items():
        lines.append(f"{k:>5}" + "".join(f"{share:>10.2%}" for share in [*seeds, sum(seeds) / len(seeds)]))
    return "\n".join(lines)
