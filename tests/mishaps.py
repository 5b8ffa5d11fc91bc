"""A plugin (`vitds.plugins`) of what befalls a run; reads are tried again for a blink instead of 40 s.

VITDS_TEST_GONE=FILE: this image is moved aside to FILE.gone when training begins.
VITDS_TEST_DIE=STEP: rank 0 is killed right after this step was logged.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from typing import Any

from vitds import dist
from vitds.data import storage
from vitds.metrics import Recorder
from vitds.run_directory import RunDirectory

storage.RETRY_AFTER_SECONDS = (0.01, 0.02)

if gone := os.environ.get("VITDS_TEST_GONE"):
    started = RunDirectory.started

    def started_without(self: RunDirectory, *where: Any) -> None:
        if dist.is_main():
            os.rename(gone, f"{gone}.gone")
        started(self, *where)

    RunDirectory.started = started_without  # type: ignore[method-assign]

if step := os.environ.get("VITDS_TEST_DIE"):
    record = Recorder.record

    def record_and_die(self: Recorder, at: int, metrics: Mapping[str, Any]) -> None:
        record(self, at, metrics)
        if at == int(step) and dist.is_main():
            os.kill(os.getpid(), signal.SIGKILL)

    Recorder.record = record_and_die  # type: ignore[method-assign]
