"""Starts real processes on the CPU with gloo: under `deepspeed`, as a user would, or the ranks of a test's script alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
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
    ranks: int, script: Path | str, *arguments: str, timeout: float = 300, flags: Sequence[str] = (), **more: str
) -> subprocess.CompletedProcess[str]:
    """Run `deepspeed --num_gpus RANKS [FLAGS] SCRIPT …` to its end; everything it printed is in `.stdout`."""
    command = [
        str(DEEPSPEED), "--num_gpus", str(ranks), "--master_port", str(free_port()), *flags, str(script), *map(str, arguments),
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


def ranks(
    number: int, script: Path | str, *arguments: str, timeout: float = 300, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a script on so many ranks to its end, without a launcher; everything they printed is in `.stdout`.

    For what is between the ranks, and no matter of the launcher: they start in a third of the time (tests/forked.py).
    VITDS_TORTURE=1 starts them with `deepspeed` all the same.
    """
    if os.environ.get("VITDS_TORTURE"):
        return deepspeed(number, script, *arguments, timeout=timeout, **more)
    command = [sys.executable, str(ROOT / "tests" / "forked.py"), str(number), str(script), *map(str, arguments)]
    told = environment(**more) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=told, start_new_session=True, **pipes) as started:
        try:
            printed, _ = started.communicate(timeout=timeout)
        except BaseException:
            os.killpg(started.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, started.returncode, printed)


TRAINER = ROOT / "launcher" / "train.py"


def train(
    number: int, config: Path | str, output: Path | str, *overrides: str, timeout: float = 300, **more: str
) -> subprocess.CompletedProcess[str]:
    """The user's own command: `deepspeed --num_gpus NUMBER launcher/train.py --config … --output-dir … --set …`."""
    return deepspeed(number, TRAINER, *words(config, output, overrides), timeout=timeout, **more)


def train_alone(
    number: int, config: Path | str, output: Path | str, *overrides: str, timeout: float = 300, **more: str
) -> subprocess.CompletedProcess[str]:
    """The same trainer, on `ranks` without a launcher."""
    return ranks(number, TRAINER, *words(config, output, overrides), timeout=timeout, **more)


def words(config: Path | str, output: Path | str, overrides: Sequence[str]) -> list[str]:
    """The trainer's arguments."""
    return ["--config", str(config), "--output-dir", str(output), *(w for text in overrides for w in ("--set", text))]
