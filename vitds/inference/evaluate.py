"""`vitds evaluate`: how well a trained model classifies a set of images, overall and class by class."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from vitds import dist
from vitds.data import TooManyBad
from vitds.data.storage import StorageError
from vitds.data_verbs.arguments import different_numbers
from vitds.errors import UserError
from vitds.evaluation.classification import TOPS, evaluate
from vitds.evaluation.confusion import Confusion, Ranking
from vitds.inference.confusion_figure import draw
from vitds.inference.images import WHAT, add_loading, image_set
from vitds.inference.opening import Session, add_opening, opened
from vitds.inference.outputs import check_output, writing, written
from vitds.json_files import finite, say, write_json
from vitds.plots import plots
from vitds.progress import Progress

Row = dict[str, Any]


def add_verb(verbs: Any) -> None:
    """Add `evaluate` to the parser's verbs."""
    summary = "measure how well a model classifies a set of images"
    parser = verbs.add_parser("evaluate", help=summary, description=summary)
    add_opening(parser)
    parser.add_argument("--images", required=True, metavar="WHAT", help=WHAT)
    parser.add_argument(
        "--by-number", action="store_true", help="the images' classes are the model's by number, whatever their names"
    )
    parser.add_argument(
        "--top", type=different_numbers, default=TOPS, metavar="K,…", help="a label among so many best is right; 1,5"
    )
    parser.add_argument(
        "--confusion", type=Path, metavar="FILE.png", help="draw which classes are mistaken for which; needs matplotlib"
    )
    parser.add_argument("--per-class", type=Path, metavar="FILE", help="a table of all classes, .csv or .json")
    add_loading(parser)
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def run(options: argparse.Namespace, load: Callable[..., Any]) -> int:
    """Evaluate and print; 1 where no image could be used, too many could not, or storage fails.

    Raises:
        UserError: a model or images that cannot be used, classes that are not the model's, or an output that cannot be
            written or is there already.
    """
    check_output("--confusion", options.confusion, (".png",))
    check_output("--per-class", options.per_class, (".csv", ".json"))
    if options.confusion is not None:
        plots("--confusion")
    try:
        return _evaluate(options, load)
    except (StorageError, TooManyBad) as error:
        say(f"vitds: {error}")
        return 1


def _evaluate(options: argparse.Namespace, load: Callable[..., Any]) -> int:
    with opened(options) as session:
        if session.config.num_classes == 0:
            raise UserError(
                f"--checkpoint {str(session.path)!r}: this model has no classifier; `vitds fewshot` measures one"
            )
        images = image_set(options.images, load)
        images = images if options.by_number else images.with_classes_of(session)
        loader = images.loader(session, options)
        confusion = Confusion(session.config.num_classes, options.top)
        ranking = Ranking() if images.source.multi_label and session.config.loss == "sigmoid" else None
        with Progress("evaluating", len(images.source)) if dist.is_main() else nullcontext() as progress:
            found = evaluate(
                session,
                loader,
                session.config.loss,
                lambda: None if progress is None else progress.add(options.batch * dist.world_size()),
                tops=options.top,
                witnesses=[confusion, *([ranking] if ranking is not None else [])],
            )
        figures: dict[str, Any] = {name.removeprefix("eval/"): value for name, value in found.items()}
        figures["images"] = int(figures["images"])
        if ranking is not None and (precision := ranking.mean_average_precision()) is not None:
            figures |= {"mean_average_precision": precision[0], "classes_with_images": precision[1]}
        loader.bad.share()
        bad = len(loader.bad_samples)
        confusion.share()
        if dist.is_main():
            about = {"checkpoint": str(session.path), "step": session.step, "data": options.images}
            if options.per_class is not None:
                _write_table(options.per_class, table(confusion, session.labels))
            if options.confusion is not None:
                draw(confusion, session.labels, options.confusion, f"{options.images}: {_heading(figures)}")
            print(
                json.dumps(finite({**about, **figures, "unusable": bad}), indent=2, ensure_ascii=False)
                if options.json
                else "\n".join(described(figures, confusion, session, bad, ranking is not None))
            )
    return 0 if figures["images"] else 1


def table(confusion: Confusion, names: Sequence[str]) -> list[Row]:
    """A row for each class: its images, the shares of them that are right, and for what it is mistaken most often."""
    worst = confusion.most_confused()
    rows = []
    for label, name in enumerate(names):
        images = int(confusion.images[label])
        right = confusion.right[:, label] / images if images else [None] * len(confusion.tops)
        mistake = worst.get(label)
        rows.append({
            "class": label, "name": name, "images": images,
            **{f"top{k}": None if share is None else float(share) for k, share in zip(confusion.tops, right, strict=True)},
            "confused_with": None if mistake is None else names[mistake.predicted],
            "confused_images": 0 if mistake is None else mistake.images,
        })  # fmt: skip
    return rows


def described(figures: dict[str, Any], confusion: Confusion, session: Session, bad: int, ranked: bool) -> list[str]:
    """What was found, for a reader."""
    unusable = f", {bad} unusable" if bad else ""
    lines = [f"{session.path}", f"{figures['images']:,.0f} images{unusable}"]
    if not figures["images"]:
        return lines
    lines += [f"top-{k}: {figures[f'top{k}']:.2%}" for k in confusion.tops]
    lines.append(f"loss ({session.config.loss} cross-entropy): {figures['loss']:.4f}")
    if "mean_average_precision" in figures:
        lines.append(
            f"mean average precision: {figures['mean_average_precision']:.2%}, over the {figures['classes_with_images']} classes "
            "that have an image; images without a label are left out of it, as of all else"
        )
    elif ranked:
        lines.append(
            "mean average precision: not worked out, the scores of all images and classes are too many to keep"
        )
    for mistake in confusion.worst(5):
        label, predicted = session.labels[mistake.label], session.labels[mistake.predicted]
        lines.append(f"  {mistake.images} of {confusion.images[mistake.label]} {label!r} taken for {predicted!r}")
    return lines


def _heading(figures: dict[str, Any]) -> str:
    shares = [f"{name.replace('top', 'top-')} {value:.2%}" for name, value in figures.items() if name.startswith("top")]
    return ", ".join([f"{figures['images']:,.0f} images", *shares])


def _write_table(path: Path, rows: list[Row]) -> None:
    if path.suffix.lower() == ".json":
        with writing("--per-class", path):
            write_json(path, rows)
        return
    with written("--per-class", path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
