"""`vitds predict`: what a trained model sees in images, as labels with scores."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitds import dist
from vitds.data.folder import EXTENSIONS
from vitds.data.images import Unusable, decode
from vitds.data_verbs.arguments import at_least_one
from vitds.errors import UserError
from vitds.inference.opening import Session, add_opening, opened
from vitds.json_files import say

Answer = dict[str, Any]
"""`image`, a path, and `predictions`, best first, or `error`, why there are none."""


def add_verb(verbs: Any) -> None:
    """Add `predict` to the parser's verbs."""
    summary = "print labels with scores for images"
    parser = verbs.add_parser("predict", help=summary, description=summary)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, and folders of them, also within others")
    add_opening(parser)
    parser.add_argument("--top", type=at_least_one, default=5, metavar="K", help="labels of each image; 5")
    parser.add_argument("--batch", type=at_least_one, default=32, metavar="N", help="images of a rank at once; 32")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image and line")


def run(options: argparse.Namespace) -> int:
    """Print labels for all images; 1 where one cannot be used, which is named on standard error.

    Raises:
        UserError: no image there, or a model that cannot be opened or has no classifier.
    """
    paths = image_files(options.images)
    failed = 0
    with opened(options) as session:
        if session.config.num_classes == 0:
            raise UserError(f"--checkpoint {str(session.path)!r}: this model has no classifier and knows no labels")
        here = [paths[first : first + options.batch] for first in range(0, len(paths), options.batch)]
        own = here[dist.rank() :: dist.world_size()]
        rounds = -(-len(here) // dist.world_size())
        own += [[]] * (rounds - len(own))
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            waiting = prepared(threads, session, own[0])
            for following in [*own[1:], []]:  # which are decoded while the model is at work
                current, waiting = waiting, prepared(threads, session, following)
                for answers in dist.all_objects(predictions(session, current, options.top)):
                    for answer in answers:
                        failed += "error" in answer
                        if dist.is_main():
                            _show(answer, options.json)
    return 1 if failed else 0


def image_files(named: Sequence[str]) -> list[Path]:
    """The files that are named, and those in folders that are, in order of their paths.

    Raises:
        UserError: a folder without an image. Files are opened later: of one that is not there the answer is an error.
    """
    found: list[Path] = []
    for text in named:
        path = Path(text).expanduser()
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())
            if not inside:
                raise UserError(f"{text!r}: no image in this folder ({', '.join(EXTENSIONS)})")
            found += inside
        else:
            found.append(path)
    return found


def prepared(threads: ThreadPoolExecutor, session: Session, paths: list[Path]) -> list[tuple[Path, Future[Any]]]:
    """What will be the images of a batch, decoded and fitted by threads."""
    return [(path, threads.submit(_pixels, session, path)) for path in paths]


def _pixels(session: Session, path: Path) -> np.ndarray:
    """(3, S, S) fp32, as the model takes them.

    Raises:
        Unusable, OSError: of this image there will be no labels.
    """
    pixels: np.ndarray = session.processor(decode(path.read_bytes()))["pixel_values"][0]
    return pixels


def predictions(session: Session, images: list[tuple[Path, Future[Any]]], top: int) -> list[Answer]:
    """The answers for one batch of images, each with the `top` best labels."""
    answers: list[Answer] = [{"image": str(path)} for path, _ in images]
    pixels, places = [], []
    for place, (_, future) in enumerate(images):
        try:
            pixels.append(future.result())
            places.append(place)
        except (Unusable, OSError, UserError) as error:
            answers[place]["error"] = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    if pixels:
        found = session.scores(torch.from_numpy(np.stack(pixels)).to(session.device))  # (B, C)
        best = np.argsort(-found, axis=1, kind="stable")[:, :top]
        for place, row, numbers in zip(places, found, best, strict=True):
            if not np.isfinite(row).all():
                answers[place]["error"] = "the model's scores of it are not finite: its weights or activations overflow"
                continue
            answers[place]["predictions"] = [
                {"label": session.labels[number], "score": row[number].item()} for number in numbers
            ]
    return answers


def _show(answer: Answer, as_json: bool) -> None:
    if as_json:
        print(json.dumps(answer, ensure_ascii=False), flush=True)
    elif "error" not in answer:
        rows = [f"  {one['score']:.4f}  {one['label']}" for one in answer["predictions"]]
        print("\n".join([answer["image"], *rows]), flush=True)
    if "error" in answer:
        say(f"vitds: {answer['image']}: {answer['error']}")
