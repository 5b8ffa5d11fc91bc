"""The processes of one `vitds run` on one host: known by a mark in their environment, signalled, ended.

Only the standard library is imported, and nothing of vitds: remote.py hands this very file to `python -` on other hosts.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

MARK = "PYTHON_VITDS_RUN"
"""Environment variable that names the run a process belongs to, also when its parents are gone. Python knows no such
variable; the `deepspeed` launcher takes to other hosts what begins with PYTHON, whatever carries it there (ssh, MPI, srun)."""


RANK = (b"RANK=", b"OMPI_COMM_WORLD_RANK=")
"""What a launcher tells a rank: variables of its own environment, by which it is known as one."""


class Process(NamedTuple):
    """One living process that carries the mark."""

    parent: int
    has_rank: bool
    is_launcher: bool


def marked(mark: str) -> dict[int, Process]:
    """The living processes of this host that carry `mark`, by pid. Those of other users cannot be read, and are not ours."""
    found, wanted = {}, f"{MARK}={mark}".encode()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            variables = _read(f"/proc/{name}/environ").split(b"\0")  # empty for what has ended and waits for its parent
            if wanted in variables:
                parent = int(_read(f"/proc/{name}/stat").rpartition(b")")[2].split()[1])
                has_rank = any(variable.startswith(RANK) for variable in variables)
                words = _read(f"/proc/{name}/cmdline")
                # An ssh session has the command of the other host in its own words.
                is_launcher = b"deepspeed.launcher" in words and os.path.basename(words.split(b"\0")[0]) not in (
                    b"ssh",
                    b"pdsh",
                )
                found[int(name)] = Process(parent, has_rank, is_launcher)
        except OSError:  # it has ended, or is another user's
            continue
    return found


def ranks(mark: str) -> list[int]:
    """Processes with RANK in their environment whose parents have none: not the workers of ranks."""
    all_of_them = marked(mark)
    nobody = Process(0, False, False)
    return [p for p, it in all_of_them.items() if it.has_rank and not all_of_them.get(it.parent, nobody).has_rank]


def left(mark: str) -> list[int]:
    """What a run is made of: ranks, their workers and DeepSpeed's launchers. Anything else may outlive the command."""
    return [pid for pid, process in marked(mark).items() if process.has_rank or process.is_launcher]


def send(pids: Iterable[int], number: int) -> None:
    """Signal processes; some may have ended."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def end(mark: str, patience: float) -> tuple[int, int]:
    """End what is left of a run on this host: SIGTERM, after `patience` seconds SIGKILL.

    Returns:
        How many processes there were, and how many of them had to be killed.
    """
    found = left(mark)
    if not found:
        return 0, 0
    if patience > 0:
        send(found, signal.SIGTERM)
    _wait(mark, patience)
    stubborn = left(mark)
    send(stubborn, signal.SIGKILL)
    _wait(mark, 5.0)
    return len(found), len(stubborn)


def place() -> str:
    """Equal for two processes that see the same processes: same boot of the same host, same namespace."""
    return f"{_read('/proc/sys/kernel/random/boot_id').decode().strip()} {os.readlink('/proc/self/ns/pid')}"


def _wait(mark: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left(mark) and time.monotonic() < deadline:
        time.sleep(0.1)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def main(action: str, mark: str, argument: str, asked_from: str) -> None:
    """One JSON line: this host's name and what was done. Nothing is done at the place that asks: it has done it itself."""
    said: dict[str, object] = {"name": socket.gethostname(), "here": place() == asked_from}
    if action == "signal" and not said["here"]:
        found = ranks(mark)
        send(found, int(argument))
        said["signalled"] = len(found)
    elif action == "end" and not said["here"]:
        said["ended"], said["killed"] = end(mark, float(argument))
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
