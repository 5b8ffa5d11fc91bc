"""`vitds data bench`: measure what preparing a run file's images costs, and whether the loader or the device will be the bottleneck."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from vitds.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `vitds data bench` takes."""


def run(options: argparse.Namespace, load: Callable[..., Any]) -> int:
    """Do it; the exit code."""
    raise UserError("vitds data bench: to come")
