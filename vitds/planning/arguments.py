"""Words of the command line that several verbs of planning read alike."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    """A whole number, as an argument's type."""
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= 10**6:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 1000000, found {text!r}")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Whole numbers between commas, sorted, each once."""
    return tuple(sorted({count(part.strip()) for part in text.split(",")}))
