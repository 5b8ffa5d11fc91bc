"""`vitds data stats`: count classes, sizes and formats of a set of images, and find its broken files."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable
from typing import Any

from vitds.data_verbs.arguments import add_config, add_workers, open_path, open_role
from vitds.data_verbs.tally import Tally, summary
from vitds.data_verbs.workers import each
from vitds.errors import UserError
from vitds.progress import Progress

PIECE = 256
"""Images of one piece of work."""
MOST_CLASSES = 40
"""Above, the text shows only the fullest and the emptiest; --json has all."""
MOST_BROKEN = 20
BAR = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `vitds data stats` takes."""
    add_config(parser)
    parser.add_argument("--role", choices=("train", "eval"), default="train", help="which images of the run file")
    parser.add_argument("--path", help="in place of a run file: a folder, tar shards or a data set")
    parser.add_argument(
        "--decode", action="store_true", help="decode every image, not only its header, as training would"
    )
    add_workers(parser)
    parser.add_argument("--json", action="store_true", help="print all counts as JSON")


def run(options: argparse.Namespace, load: Callable[..., Any]) -> int:
    """Count and print; 1 where an image is broken: undecodable, too large, or without a right label.

    Raises:
        UserError: neither or both of --config and --path, or images that cannot be opened.
        StorageError: an image cannot be read.
    """
    if (options.config is None) == (options.path is None):
        raise UserError("vitds data stats: give either --config or --path")
    num_classes = None
    if options.path is not None:
        source = open_path(options.path, "--path")
    else:
        run_file = load(options.config, options.set, world_size=None)
        source, num_classes = open_role(run_file, options.role), run_file.vitds.model.num_classes

    def count(piece: range) -> Tally:
        tally = Tally()
        for sample in source.read_many(piece):
            tally.add(sample, num_classes, options.decode)
        return tally

    total = Tally()
    pieces = [range(first, min(first + PIECE, len(source))) for first in range(0, len(source), PIECE)]
    with Progress("decoding" if options.decode else "reading headers", len(source)) as progress:
        with contextlib.closing(each(count, pieces, options.workers)) as tallies:
            for tally in tallies:
                total.merge(tally)
                progress.add(tally.images)
    found = summary(total, list(source.class_names))
    if options.json:
        print(json.dumps({**found, "decoded": options.decode}, indent=2, ensure_ascii=False))
    else:
        print("\n".join(described(found, options.decode)))
    return 1 if total.broken else 0


def described(found: dict[str, Any], decoded: bool) -> list[str]:
    """The counts for a reader."""
    images = found["images"]
    lines = [
        f"{images:,} images, {found['bytes'] / 1e6:,.1f} MB, {found['bytes'] / images:,.0f} bytes each",
        "formats: " + _counted(found["formats"]),
        "of them: " + (_counted(found["kinds"]) or "none grey, CMYK, palette, 16-bit, with alpha or EXIF-rotated"),
    ]
    for edge in ("width", "height"):
        lines.append(f"{edge}: " + ", ".join(f"{name} {value}" for name, value in found[edge].items()))
    for end in ("smallest", "largest"):
        if found[end]:
            lines.append(f"{end}: {found[end]['width']}×{found[end]['height']}, {found[end]['key']}")
    if set(found["labels_per_image"]) - {"1"}:
        lines.append(
            "labels of an image: " + ", ".join(f"{n} for {images:,}" for n, images in found["labels_per_image"].items())
        )
    lines += ["", *_histogram(found["classes"])]
    broken = found["broken"]
    how = "" if decoded else " by their headers; --decode finds the rest"
    lines += ["", f"{len(broken)} broken{how}"]
    lines += [f"  {one['key']}: {one['reason']}" for one in broken[:MOST_BROKEN]]
    if len(broken) > MOST_BROKEN:
        lines.append(f"  … and {len(broken) - MOST_BROKEN} more (--json lists all)")
    return lines


def _histogram(classes: list[dict[str, Any]]) -> list[str]:
    """A bar for each class, or for the fullest and emptiest of many."""
    if not classes:
        return ["no labels"]
    counts = [one["images"] for one in classes]
    lines = [f"{len(classes)} classes, {min(counts)} to {max(counts)} images each, {counts.count(0)} without any"]
    shown: list[dict[str, Any] | None] = list(classes)
    if len(classes) > MOST_CLASSES:
        ordered = sorted(classes, key=lambda one: (-one["images"], one["label"]))
        shown = [*ordered[: MOST_CLASSES // 2], None, *ordered[-(MOST_CLASSES // 2) :]]
    names = [f"{one['label']} {one.get('name', '')}".strip()[:30] if one else "…" for one in shown]
    wide, most = max(map(len, names)), max(max(counts), 1)
    for name, one in zip(names, shown, strict=True):
        bar = "█" * -(-BAR * one["images"] // most) if one else ""
        lines.append(f"  {name:{wide}} {one['images'] if one else '':>9} {bar}".rstrip())
    return lines


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())
