"""`vitds embed`: the features of images, in files that any safetensors reader opens (vitds/inference/embeddings.py)."""

from __future__ import annotations

import argparse
import itertools
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitds import dist
from vitds.checkpoint.files import sync_directory
from vitds.data import BadSample
from vitds.data.minival import Part as Some
from vitds.data.source import Label, Source
from vitds.errors import UserError
from vitds.evaluation.features import features
from vitds.inference.embeddings import DTYPES, KEYS, Part, PartWriter, keys_format, manifest_of, part_names
from vitds.inference.images import WHAT, ImageSet, add_loading, image_set
from vitds.inference.opening import Session, add_opening, opened
from vitds.inference.outputs import check_free, writing
from vitds.json_files import say, write_json
from vitds.progress import Progress

FILE_BYTES = 2 * 10**9
ANY_CLASS = 2**31 - 1
NAMED = 5


def add_verb(verbs: Any) -> None:
    """Add `embed` to the parser's verbs."""
    summary = "write a model's features of images as safetensors, with the images' keys and labels"
    parser = verbs.add_parser("embed", help=summary, description=summary)
    add_opening(parser)
    parser.add_argument("--images", required=True, metavar="WHAT", help=WHAT)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="made; must not be there")
    parser.add_argument("--features", choices=DTYPES, default="fp32", help="how features are kept; fp32 when absent")
    parser.add_argument("--keys", choices=KEYS, help="how keys are kept; parquet where pyarrow is, else jsonl")
    parser.add_argument("--file-bytes", type=int, default=FILE_BYTES, metavar="N", help=f"most bytes of a file of features; {FILE_BYTES:,}")  # fmt: skip
    add_loading(parser)


def run(options: argparse.Namespace, load: Callable[..., Any]) -> int:
    """Write them. On several ranks each writes files of its own, of neighbouring images.

    Raises:
        UserError: a model or images that cannot be used, an output that is there already, more unusable images than allowed.
    """
    with opened(options) as session:
        keys = keys_format(options.keys)
        output = Path(options.output).expanduser()
        check_free("--output", output)
        images = image_set(options.images, load)
        temporary = output.with_name(f".{output.name}.tmp")
        try:
            dist.together(lambda: _make(temporary) if dist.is_main() else None)
            written, bad = dist.together(lambda: _write_own(images, session, options, temporary, keys))
            parts = [part for ranks in dist.all_objects(written) for part in ranks]
            unusable = [one for ranks in dist.all_objects(bad) for one in ranks]
            if len(unusable) > options.max_bad_samples:
                named = "; ".join(f"{one.key} ({one.reason})" for one in unusable[:3])
                raise UserError(
                    f"--images {options.images}: {len(unusable)} images cannot be used (--max-bad-samples {options.max_bad_samples}): {named}"
                )
            about = _about(options, session, images, unusable)
            dist.together(lambda: _finish(temporary, output, about, parts) if dist.is_main() else None)
        except BaseException:
            if dist.is_main():
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if dist.is_main():
            for one in unusable[:NAMED]:
                say(f"vitds: left out: {one.key}: {one.reason}")
            rows, size = sum(part.rows for part in parts), sum(part.bytes for part in parts)
            print(
                f"{output}: {rows:,} × {session.config.width} {options.features}, {size / 1e6:,.1f} MB in {len(parts)} files"
            )
    return 0


def _write_own(
    images: ImageSet, session: Session, options: argparse.Namespace, directory: Path, keys: str
) -> tuple[list[Part], list[BadSample]]:
    """This rank's files, and the images that it had to leave out."""
    ranges, count, first = _shared(len(images.source), session, options)
    source, parts, bad = images.source, list[Part](), list[BadSample]()
    total = sum(len(indices) for indices in ranges)
    with Progress("embedding", total) if dist.is_main() else nullcontext() as progress:
        for number, indices in enumerate(ranges, first):
            some = replace(images, source=Some(source, np.arange(indices.start, indices.stop)))
            loader = some.loader(session, options, num_classes=_classes(source, session), shared=False)
            names, dtype = part_names(count, number, keys), DTYPES[options.features]
            with writing("--output", options.output):
                writer = PartWriter(directory, names, session.config.width, dtype, source.multi_label)
            try:
                for batch in features(session, loader):
                    there = (batch.indices + indices.start).tolist()
                    keys_there = [source.key(i) for i in there]
                    for key, fine in zip(keys_there, batch.features.isfinite().all(dim=1).tolist(), strict=True):
                        if not fine:
                            raise UserError(
                                f"--images {options.images}: the features of {key} are not finite: the model's weights or activations overflow"
                            )
                    with writing("--output", options.output):
                        writer.write(batch.features, keys_there, _listed(batch.labels))
                    if progress is not None:
                        progress.add(options.batch)
                with writing("--output", options.output):
                    parts.append(writer.close())
            except BaseException:
                writer.abandon()
                raise
            bad += loader.bad_samples
    return parts, bad


def _shared(number: int, session: Session, options: argparse.Namespace) -> tuple[list[range], int, int]:
    """The images of each file of this rank, how many files there are on all ranks, and the number of this rank's first."""
    each = max(1, options.file_bytes // (session.config.width * DTYPES[options.features].itemsize))
    world = dist.world_size()
    bounds = [number * rank // world for rank in range(world + 1)]
    files = [-(-(end - start) // each) for start, end in itertools.pairwise(bounds)]
    rank = dist.rank()
    start, end = bounds[rank], bounds[rank + 1]
    ranges = [range(one, min(one + each, end)) for one in range(start, end, each)]
    return ranges, sum(files), sum(files[:rank])


def _classes(source: Source, session: Session) -> int:
    """More than any label of the source names, where it takes no memory; they need not be the model's."""
    if not source.multi_label:
        return ANY_CLASS
    number = max(len(source.class_names), session.config.num_classes, 1)
    while source.count_labels_from(number):
        number *= 2
    return number


def _listed(labels: torch.Tensor) -> Sequence[Label]:
    labels = labels.cpu()
    return labels.tolist() if labels.ndim == 1 else [row.nonzero()[:, 0].tolist() for row in labels]  # type: ignore[no-any-return]


def _make(temporary: Path) -> None:
    """An empty directory; what a run that was killed left there is thrown away."""
    with writing("--output", temporary):
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()


def _finish(temporary: Path, output: Path, about: dict[str, Any], parts: Sequence[Part]) -> None:
    with writing("--output", output):
        write_json(temporary / "manifest.json", manifest_of(about, parts))
        sync_directory(temporary)
        temporary.rename(output)
        sync_directory(output.absolute().parent)


def _about(
    options: argparse.Namespace, session: Session, images: ImageSet, unusable: Sequence[BadSample]
) -> dict[str, Any]:
    source = images.source
    return {
        "checkpoint": str(session.path.absolute()), "step": session.step, "ema": options.ema, "model": session.config.to_diff_dict(),
        "computed_in": options.dtype, "dtype": options.features, "width": session.config.width, "layer": "pre_logits",
        "prepared": images.section.transforms or session.processor.to_dict(),
        "source": {"named": options.images, "images": len(source), "digest": source.digest(),
                   "multi_label": source.multi_label, "class_names": list(source.class_names)},
        "unusable": [{"key": one.key, "reason": one.reason} for one in unusable],
        "versions": {name: version(name) for name in ("vitds", "torch", "transformers")},
    }  # fmt: skip
