"""`vitds data index | bench | pack | stats | dedup`."""

from __future__ import annotations

import argparse
import io
import signal
import sys
from collections.abc import Callable
from typing import Any

from vitds.data.storage import StorageError
from vitds.data_verbs import bench, dedup, index, pack, stats
from vitds.errors import Stopped
from vitds.json_files import say

VERBS = {"index": index, "bench": bench, "pack": pack, "stats": stats, "dedup": dedup}
"""Each has a first line of its docstring that says what it does, `add_arguments(parser)` and `run(options, load)`."""


def add_verb(verbs: Any) -> None:
    """Add `data` and what may follow it to the parser's verbs."""
    data = verbs.add_parser("data", help="make, index, measure and clean sets of images")
    actions = data.add_subparsers(dest="action", required=True)
    for name, module in VERBS.items():
        summary = (module.__doc__ or "").splitlines()[0].partition(": ")[2].rstrip(".")
        module.add_arguments(actions.add_parser(name, help=summary, description=summary))


def run(options: argparse.Namespace, load: Callable[..., Any]) -> int:
    """Do what `add_verb` has parsed; the exit code: 1 also where storage fails, 130 where the user ends it.

    Args:
        load: vitds.config.load_run_file, which lives on a higher floor.

    Raises:
        UserError: arguments, a run file or images that cannot be used as they are.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name that is not UTF-8, as JSON has it
    try:
        return VERBS[options.action].run(options, load)
    except (StorageError, Stopped) as error:
        say(f"vitds: {error}")
        return 1
    except KeyboardInterrupt:
        say("vitds: stopped")
        return 128 + signal.SIGINT
