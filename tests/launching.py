"""Starts real `deepspeed` processes, as a user would, on the CPU with gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEEPSPEED = Path(sys.executable).with_name("deepspeed")


def environment(**more: str) -> dict[str, str]:
    """This environment, on the CPU, one thread a rank, and without a launcher's variables."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH", "")])])
    bin_path = os.pathsep.join([str(DEEPSPEED.parent), kept.get("PATH", "")])
    return {**kept, "PYTHONPATH": path, "PATH": bin_path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **more}


def free_port() -> int:
    """A port nobody listens on just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def deepspeed(
    ranks: int, script: Path | str, *arguments: str, timeout: float = 300, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run `deepspeed --num_gpus RANKS SCRIPT …` to its end; everything it printed is in `.stdout`."""
    command = [
        str(DEEPSPEED), "--num_gpus", str(ranks), "--master_port", str(free_port()), str(script), *map(str, arguments),
    ]  # fmt: skip
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(**more),
        timeout=timeout,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def train(
    ranks: int, config: Path | str, output: Path | str, *overrides: str, timeout: float = 300, **more: str
) -> subprocess.CompletedProcess[str]:
    """The user's own command: `deepspeed --num_gpus RANKS launcher/train.py --config … --output-dir … --set …`."""
    arguments = ["--config", str(config), "--output-dir", str(output)]
    for override in overrides:
        arguments += ["--set", override]
    return deepspeed(ranks, ROOT / "launcher" / "train.py", *arguments, timeout=timeout, **more)
