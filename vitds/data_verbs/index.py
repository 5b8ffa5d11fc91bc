"""`vitds data index`: record where each image of tar shards lies, so that it can be read by offset."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from vitds.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `vitds data index` takes."""


def run(options: argparse.Namespace, load: Callable[..., Any]) -> int:
    """Do it; the exit code."""
    raise UserError("vitds data index: to come")
