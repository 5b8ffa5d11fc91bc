"""`vitds data dedup`: find near-duplicates of the evaluation images among the training images, and write them as a list to exclude."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from vitds.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `vitds data dedup` takes."""


def run(options: argparse.Namespace, load: Callable[..., Any]) -> int:
    """Do it; the exit code."""
    raise UserError("vitds data dedup: to come")
