"""`vitds data stats`: count classes, sizes and formats of a set of images, and find its broken files."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from vitds.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `vitds data stats` takes."""


def run(options: argparse.Namespace, load: Callable[..., Any]) -> int:
    """Do it; the exit code."""
    raise UserError("vitds data stats: to come")
