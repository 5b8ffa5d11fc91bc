"""A plugin (`vitds.plugins`) of what befalls a run; reads are tried again for a blink instead of 40 s.

VITDS_TEST_GONE=FILE: this image is moved aside to FILE.gone when training begins.
VITDS_TEST_OTHER=FILE: FILE.other takes its place when training begins.
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

gone, other = os.environ.get("VITDS_TEST_GONE"), os.environ.get("VITDS_TEST_OTHER")
started = RunDirectory.started


def started_with_a_mishap(self: RunDirectory, *where: Any) -> None:
    if dist.is_main() and gone:
        os.rename(gone, f"{gone}.gone")
    if dist.is_main() and other:
        os.rename(f"{other}.other", other)
    dist.barrier()
    started(self, *where)


RunDirectory.started = started_with_a_mishap  # type: ignore[method-assign]

if step := os.environ.get("VITDS_TEST_DIE"):
    record = Recorder.record

    def record_and_die(self: Recorder, at: int, metrics: Mapping[str, Any]) -> None:
        record(self, at, metrics)
        if at == int(step) and dist.is_main():
            os.kill(os.getpid(), signal.SIGKILL)

    Recorder.record = record_and_die  # type: ignore[method-assign]
