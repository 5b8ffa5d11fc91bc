"""The order in which files are given out (`make test`): the longest first, so that no worker is left alone with one."""

from __future__ import annotations

import pytest

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
