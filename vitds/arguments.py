"""The command line of launcher/train.py."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from vitds import dist
from vitds.errors import UserError
from vitds.metrics import Window


class _Arguments(argparse.ArgumentParser):
    """Mistakes on the command line are the user's like any other: one message from one rank, exit code 2."""

    def error(self, message: str) -> NoReturn:
        if re.search("unrecognized arguments:.*=", message):
            message += (
                "\n(A shell may have taken a value of --set apart: DeepSpeed hands arguments to the other hosts' shells "
                "bare. Put values with braces, quotes or blanks into the run file.)"
            )
        raise UserError(f"{message}\n{self.format_usage().strip()}")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """After --help."""
        dist.leave(status)


def training_arguments(description: str | None) -> argparse.Namespace:
    """The command line of launcher/train.py.

    Raises:
        UserError: an unknown or missing argument.
    """
    parser = _Arguments(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="run file: DeepSpeed's keys and a section vitds")
    parser.add_argument("--output-dir", required=True, help="directory of this run: checkpoints, metrics, events")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in vitds.train.seed=1")
    parser.add_argument("--profile", type=Window.parse, default=Window(), metavar="FIRST:COUNT[:RANKS]",
                        help="trace COUNT steps from step FIRST on, on rank 0 or RANKS, and say where their time went")  # fmt: skip
    parser.add_argument("--ignore-forecast", action="store_true",
                        help="start also what plainly needs more memory than there is (vitds plan)")  # fmt: skip
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    options = parser.parse_args()
    options.profile.check_ranks(dist.world_size())
    return options
