"""Real steps of a run file on noise, each in a process of its own that may run out of memory (vitds.trial)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS = 5


@dataclass(frozen=True)
class Trial:
    """What became of it."""

    images_per_second: float = 0.0
    peak_bytes: int = 0
    """On a GPU torch's tensors at most; on a CPU what the process grew by."""
    optimizer: str = ""
    """As vitds.planning.shapefinder.OPTIMIZERS calls it."""
    failed: str = ""
    """Why there is no figure."""


def try_steps(run_file: Mapping[str, Any], overrides: Sequence[str], steps: int, on_cpu: bool) -> Trial:
    """Train on this machine's first device, alone, for so many optimizer steps after one that does not count.

    Args:
        overrides: "a.b.c=value" of the run file.
        on_cpu: whether or not there is a GPU.
    """
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "shape.json"
        path.write_text(json.dumps(run_file))
        words = [sys.executable, "-m", "vitds.trial", str(path), str(steps), *overrides]
        launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        told = {name: value for name, value in os.environ.items() if name not in launched}
        told |= {"DS_ACCELERATOR": "cpu"} if on_cpu else {}
        done = subprocess.run(words, env=told, text=True, capture_output=True)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return Trial(failed=f"out of memory ({name})" if name == "SIGKILL" else f"killed by {name}")
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines()
        return Trial(failed=said[-1] if said else f"exit code {done.returncode}")
    return Trial(**json.loads(lines[-1]))
