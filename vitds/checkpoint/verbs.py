"""`vitds checkpoint ls | verify | diff`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vitds.checkpoint.compare import compare
from vitds.checkpoint.integrity import checkpoint_homes, is_checkpoint, listing, newest_whole, opened, verify
from vitds.errors import UserError


def add_verb(verbs: Any) -> None:
    """Add `checkpoint` and what may follow it to the parser's verbs."""
    checkpoint = verbs.add_parser("checkpoint", help="list, verify or compare checkpoints")
    actions = checkpoint.add_subparsers(dest="action", required=True)
    listed = actions.add_parser("ls", help="list the checkpoints of a run, or of every run in a directory")
    listed.add_argument("path", type=Path)
    verified = actions.add_parser(
        "verify", help="read every byte and compare it with the manifest; exit code 1 if anything is bad"
    )
    verified.add_argument("path", type=Path, help="a run, its checkpoints/, one checkpoint, or a directory of runs")
    compared = actions.add_parser("diff", help="compare two checkpoints tensor by tensor; exit code 1 if they differ")
    compared.add_argument("a", type=Path, help="a checkpoint, or a run for its newest")
    compared.add_argument("b", type=Path)
    compared.add_argument(
        "--tolerance",
        type=_tolerance,
        metavar="T",
        help="tensors whose root mean square difference is at most T of the larger side's count as the same",
    )


def run(options: argparse.Namespace) -> int:
    """Do what `add_verb` has parsed; the exit code.

    Raises:
        UserError: a path that holds nothing of the kind, a checkpoint that cannot be compared.
    """
    if options.action == "ls":
        if is_checkpoint(options.path):
            raise UserError(f"{options.path}: is one checkpoint; name its run, or use verify")
        for home in checkpoint_homes(options.path):
            print("\n".join(listing(home)))
        return 0
    if options.action == "verify":
        bad = 0
        for verdict in verify(options.path):
            print(verdict, flush=True)
            bad += bool(verdict.problems)
        return 1 if bad else 0
    sides = []
    for path in (options.a, options.b):
        found = opened(newest_whole(path))
        if isinstance(found, UserError):
            raise found
        sides.append(found)
    same, lines = compare(sides[0], sides[1], options.tolerance)
    print("\n".join(lines))
    return 0 if same else 1


def _tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number ≥ 0, found {text}")
    return value
