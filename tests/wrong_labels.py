"""A plugin (`vitds.plugins`): digits of which one global batch carries the labels of all classes, so that its loss leaps.

VITDS_TEST_DIE=1: everything is killed right after the positions were given up, before the rollback itself.
VITDS_TEST_SLOW_DISK=1: the save of the step before that batch is being written until the positions are given up.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from vitds.checkpoint import save
from vitds.checkpoint.share import Written
from vitds.data import SOURCES
from vitds.data.digits import Digits
from vitds.data.order import order
from vitds.run_directory import RunDirectory

GLOBAL_BATCH, WRONG_STEP = 24, 12


class WrongDigits(Digits):
    multi_label = True

    def __init__(self, section: Any, role: str) -> None:
        super().__init__(section, role)
        positions = range(GLOBAL_BATCH * WRONG_STEP, GLOBAL_BATCH * (WRONG_STEP + 1)) if role == "train" else []
        self.wrong = {order(0, position, len(self)) for position in positions}

    def read(self, index: int) -> Any:
        image, label, key = super().read(index)
        return image, list(range(10)) if index in self.wrong else [label], key


SOURCES["wrong digits"] = WrongDigits  # type: ignore[assignment]

if os.environ.get("VITDS_TEST_DIE"):
    add_skip = RunDirectory.add_skip

    def add_skip_and_die(self: RunDirectory, *edges: int, **why: Any) -> None:
        add_skip(self, *edges, **why)
        os.kill(os.getpid(), signal.SIGKILL)

    RunDirectory.add_skip = add_skip_and_die  # type: ignore[method-assign]

if os.environ.get("VITDS_TEST_SLOW_DISK"):
    write_share = save.write_share

    def write_share_late(directory: Path, *what: Any) -> Written:
        deadline = time.monotonic() + 60
        while f"step-{WRONG_STEP:09d}" in directory.name and not (directory.parent.parent / "skips.json").exists():
            assert time.monotonic() < deadline, "the loss has not leapt"
            time.sleep(0.01)
        return write_share(directory, *what)

    save.write_share = write_share_late
