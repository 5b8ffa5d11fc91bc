"""`vitds data pack`: write a folder of class folders as tar shards."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from vitds.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `vitds data pack` takes."""


def run(options: argparse.Namespace, load: Callable[..., Any]) -> int:
    """Do it; the exit code."""
    raise UserError("vitds data pack: to come")
