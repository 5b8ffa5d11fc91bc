"""`vitds data dedup`: find near-duplicates of the evaluation images among the training images, and list them to exclude."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from vitds.data import Source, build_source
from vitds.data.images import Unusable
from vitds.data_verbs.arguments import add_config, add_workers, open_path, open_role, share
from vitds.data_verbs.near import Near
from vitds.data_verbs.phash import EDGE, VIEWS, WIDE_EDGE, grey, hashes, is_flat, similarity, view
from vitds.data_verbs.workers import each
from vitds.errors import UserError
from vitds.progress import Progress

DISTANCE, SIMILARITY = 7, 0.9
PIECE = 4096
"""Images hashed, and kept in a file, together."""
READ_TOGETHER = 64
FORMAT = 1
SOUND, FLAT, BROKEN = range(3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `vitds data dedup` takes."""
    add_config(parser)
    parser.add_argument("--train-path", help="in place of a run file: a folder, tar shards or a data set")
    parser.add_argument("--eval-path", help="the images that training must not have seen")
    parser.add_argument("--out", required=True, type=Path, help="the list, for vitds.data.train.exclude")
    parser.add_argument("--work", type=Path, metavar="DIR", help="hashes are kept here; FILE.work when absent")
    parser.add_argument(
        "--distance",
        type=_distance,
        default=DISTANCE,
        metavar="D",
        help=f"most of 63 bits that differ; {DISTANCE} by default",
    )
    parser.add_argument(
        "--similarity",
        type=share,
        default=SIMILARITY,
        metavar="S",
        help=f"least correlation; {SIMILARITY} by default",
    )
    add_workers(parser)
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


@dataclass(frozen=True)
class Hashed:
    """Images of a source from `first` on."""

    first: int
    words: np.ndarray
    """uint64 (B,); 0 where `state` is not SOUND."""
    state: np.ndarray
    """uint8 (B,)."""
    small: np.ndarray | None
    """uint8 (B, 32, 32), of images that have just been decoded."""


@dataclass(frozen=True)
class Match:
    """A training image that looks like an evaluation image: one line of the list."""

    key: str
    near: str
    distance: int
    similarity: float
    mirrored: bool


@dataclass(frozen=True)
class Compared:
    """A piece of the training images, compared."""

    images: int
    flat: int
    broken: int
    candidates: int
    """Pairs of near hashes."""
    matches: list[Match]


def run(options: argparse.Namespace, load: Callable[..., Any]) -> int:
    """Compare, and write the list. Cut short, the same command goes on; with other thresholds it does not decode again.

    Raises:
        UserError: images that cannot be opened, or the same ones on both sides; a place that cannot be written.
        StorageError: an image cannot be read.
    """
    started = time.monotonic()
    train, evaluation = _sources(options, load)
    if train.digest() == evaluation.digest():
        raise UserError("vitds data dedup: the training and the evaluation images are the same")
    if options.out.is_dir():  # and not after hours of work
        raise UserError(f"--out {str(options.out)!r}: is a directory; give a file's name")
    if not os.access(options.out.parent, os.W_OK):
        raise UserError(
            f"--out {str(options.out)!r}: {str(options.out.parent)!r} is not a directory that can be written"
        )
    work = options.work or options.out.with_name(f"{options.out.name}.work")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--work {str(work)!r}: {error.strerror}") from None

    known = Known.build(evaluation, options)
    parts = dict.fromkeys(("images", "flat", "broken", "candidates"), 0)
    matches: list[Match] = []
    digest = train.digest()

    def compare(piece: range) -> Compared:
        return known.compare(train, hashed(train, digest, piece, work), options.similarity)

    with Progress("training images", len(train)) as progress:
        with contextlib.closing(each(compare, _pieces(train), options.workers)) as results:
            for one in results:
                matches += one.matches
                parts = {name: count + getattr(one, name) for name, count in parts.items()}
                progress.add(one.images)
    _write(options.out, matches)
    seconds = time.monotonic() - started
    summary = {
        "train": parts, "eval": {"images": len(evaluation), "flat": known.flat, "broken": known.broken},
        "duplicates": len(matches), "mirrored": sum(match.mirrored for match in matches),
        "of_eval_images": len({match.near for match in matches}), "distance": options.distance,
        "similarity": options.similarity, "out": str(options.out), "seconds": round(seconds, 2),
    }  # fmt: skip
    if options.json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
    else:
        print("\n".join(_described(summary)))
    return 0


def _sources(options: argparse.Namespace, load: Callable[..., Any]) -> tuple[Source, Source]:
    if options.config is not None and options.train_path is None and options.eval_path is None:
        run_file = load(options.config, options.set, world_size=None)
        # All of them: a list that was made before must not keep its own images out of the next.
        section = dataclasses.replace(run_file.vitds.data.train, exclude=None)
        return build_source(section, "train"), open_role(run_file, "eval")
    if options.config is None and options.train_path is not None and options.eval_path is not None:
        return open_path(options.train_path, "--train-path"), open_path(options.eval_path, "--eval-path")
    raise UserError("vitds data dedup: give either --config, or --train-path and --eval-path")


@dataclass(frozen=True)
class Known:
    """The evaluation images, to which training images are compared."""

    source: Source
    indices: np.ndarray
    """Of those that are neither flat nor broken, (M,)."""
    wide: np.ndarray
    """Their grey versions, uint8 (M, 64, 64)."""
    near: Near
    """Word (2v + m)·M + i is that of view v of image i, mirrored where m is 1."""
    flat: int
    broken: int

    @classmethod
    def build(cls, source: Source, options: argparse.Namespace) -> Known:
        """Decode and hash the evaluation images; they are few, and are decoded again each time.

        Raises:
            UserError: there is none that can be compared.
        """
        pieces = []
        with Progress("evaluation images", len(source)) as progress:
            with contextlib.closing(
                each(lambda p: decoded(source, p, WIDE_EDGE), _pieces(source), options.workers)
            ) as results:
                for piece in results:
                    pieces.append(piece)
                    progress.add(len(piece[1]))
        wide, state = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        sound = np.flatnonzero(state == SOUND)
        if not len(sound):
            raise UserError(f"vitds data dedup: none of the {len(source)} evaluation images can be compared")
        words = []
        for number in range(len(VIEWS)):
            small = np.stack([view(wide[i], number) for i in sound])
            words += [hashes(small), hashes(small, mirrored=True)]
        near = Near(np.concatenate(words), options.distance)
        return cls(source, sound, wide[sound], near, int((state == FLAT).sum()), int((state == BROKEN).sum()))

    def compare(self, train: Source, piece: Hashed, least: float) -> Compared:
        """For each training image of the piece, the evaluation image most like it, if their correlation is `least`."""
        sound = np.flatnonzero(piece.state == SOUND)
        query, word = self.near.pairs(piece.words[sound])
        rows, row_of_pair = np.unique(sound[query], return_inverse=True)
        if piece.small is not None:
            small = piece.small[rows]
        else:  # hashed by a start before this one: only the few that are near to something are decoded again
            small = np.empty((len(rows), EDGE, EDGE), dtype=np.uint8)
            for i, (image, _, _) in enumerate(train.read_many((piece.first + rows).tolist())):
                small[i] = grey(image)
        distances = np.bitwise_count(piece.words[sound[query]] ^ self.near.words[word])
        best: dict[int, Match] = {}
        for row, distance, at in zip(row_of_pair.tolist(), distances.tolist(), word.tolist(), strict=True):
            kind, member = divmod(at, len(self.indices))
            theirs = view(self.wide[member], kind // 2)
            alike = float(similarity(small[row], theirs[:, ::-1] if kind % 2 else theirs))
            if alike >= least and (row not in best or alike > best[row].similarity):
                near = self.source.key(int(self.indices[member]))
                best[row] = Match(train.key(piece.first + int(rows[row])), near, distance, alike, kind % 2 == 1)
        flat, broken = (int((piece.state == what).sum()) for what in (FLAT, BROKEN))
        return Compared(len(piece.state), flat, broken, len(word), list(best.values()))


def hashed(source: Source, digest: str, piece: range, work: Path) -> Hashed:
    """The hashes of these images, from the working directory or decoded and kept there."""
    path = work / f"{digest}-{piece.start:012d}-{len(piece)}-v{FORMAT}.safetensors"
    if path.exists():
        with contextlib.suppress(SafetensorError):  # torn when its host went down: made again
            kept = load_file(path)
            return Hashed(piece.start, kept["words"], kept["state"], None)
    small, state = decoded(source, piece)
    found = Hashed(piece.start, np.where(state == SOUND, hashes(small), np.uint64(0)), state, small)
    _put(path, save({"words": found.words, "state": found.state}), f"--work {str(work)!r}")
    return found


def decoded(source: Source, piece: range, edge: int = EDGE) -> tuple[np.ndarray, np.ndarray]:
    """(grey versions, uint8 (B, edge, edge); SOUND, FLAT or BROKEN of each, uint8 (B,)) of these images."""
    small = np.zeros((len(piece), edge, edge), dtype=np.uint8)
    state = np.zeros(len(piece), dtype=np.uint8)
    for first in range(0, len(piece), READ_TOGETHER):
        for i, (image, _, _) in enumerate(source.read_many(piece[first : first + READ_TOGETHER]), first):
            try:
                small[i] = grey(image, edge)
            except Unusable:
                state[i] = BROKEN
    state[(state == SOUND) & is_flat(small)] = FLAT
    return small, state


def _pieces(source: Source) -> list[range]:
    return [range(first, min(first + PIECE, len(source))) for first in range(0, len(source), PIECE)]


def _write(out: Path, matches: Sequence[Match]) -> None:
    lines = [
        json.dumps({**vars(match), "similarity": round(match.similarity, 4)}, ensure_ascii=False) + "\n"
        for match in sorted(matches, key=lambda one: one.key)
    ]
    _put(out, "".join(lines).encode(errors="backslashreplace"), f"--out {str(out)!r}")


def _put(path: Path, data: bytes, place: str) -> None:
    """Write a whole file or none; `place` names it in messages."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{place}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _described(found: dict[str, Any]) -> list[str]:
    train, evaluation = found["train"], found["eval"]
    lines = [
        f"{found['duplicates']} of {train['images']} training images look like {found['of_eval_images']} of "
        f"{evaluation['images']} evaluation images, {found['mirrored']} of them mirrored",
        f"{train['candidates']} pairs had near hashes (at most {found['distance']} bits apart); correlation "
        f"{found['similarity']:g} or more made them duplicates",
    ]
    for role, counts in (("training", train), ("evaluation", evaluation)):
        if counts["flat"] or counts["broken"]:
            lines.append(f"not compared: {counts['flat']} flat and {counts['broken']} broken {role} images")
    return [*lines, f"{found['out']}: give it as vitds.data.train.exclude"]


def _distance(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not int(text) < 16:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 15, found {text!r}")
    return int(text)
