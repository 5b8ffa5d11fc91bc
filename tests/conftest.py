"""For all tests: the order in which files are given out (`make test`), the longest first, so that no worker is left alone
with one; and Triton, which must be told before anybody imports it that its kernels are interpreted where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch

LONGEST = (
    "zero/test_trained.py", "zero/test_recorded.py", "test_launch.py", "test_rollback.py", "torture/test_killed.py",
    "torture/test_reshaped.py", "zero/test_replay.py", "test_run.py", "checkpoint/test_ema.py",
)  # fmt: skip


def place(item: pytest.Item) -> int:
    """Of its file among all; those with processes of their own come before the others."""
    path = item.path.as_posix()
    named = next((i for i, name in enumerate(LONGEST) if path.endswith(f"tests/{name}")), None)
    return named if named is not None else len(LONGEST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=place)


def _import_interpreted() -> None:
    """Decorated functions are interpreted if the word is given while they are made; children shall not inherit it."""
    given = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        from tests.optim import rounding_kernel  # noqa: F401
        from vitds.optim.kernels import adafactor  # noqa: F401
    except ImportError:  # no triton here: its tests skip
        pass
    finally:
        if given is None:
            del os.environ["TRITON_INTERPRET"]


if not torch.cuda.is_available():
    _import_interpreted()
