"""What `vitds run` does on the other hosts of a hostfile: over ssh, on all at once, within a bounded time."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vitds.cluster.supervise import marked

CONNECT_SECONDS = 5
BOUND_SECONDS = 20.0
"""How long a host may take over what it is asked, beside what it is asked to wait."""
KEEP_ALIVE = "-o ServerAliveInterval=10 -o ServerAliveCountMax=3 -o ConnectTimeout=10"
"""For the ssh sessions of a job itself: one to a host that has died ends after 40 seconds, not never."""
_AT_ONCE = 64


@dataclass(frozen=True)
class Answer:
    """What one host has said, or why it has not."""

    host: str
    """As the hostfile names it."""
    name: str = ""
    """As it calls itself (`socket.gethostname()`)."""
    here: bool = False
    """It is the host that asks."""
    done: int = 0
    """Processes signalled, or ended."""
    killed: int = 0
    """Of those ended, the ones that had to be killed."""
    trouble: str = ""
    """Why there is no answer; empty if there is one."""


class Remote:
    """The hosts of one run.

    Args:
        mark: of the run's processes.
        port: where sshd listens, if it is not the usual port.
    """

    def __init__(self, mark: str, port: str | None = None) -> None:
        self._mark = mark
        self._options = ["-oBatchMode=yes", f"-oConnectTimeout={CONNECT_SECONDS}", "-oServerAliveInterval=5"]
        # What a user needs to reach the hosts, such as a key, stands where pdsh reads it; of two values ssh takes the first.
        self._options += os.environ.get("PDSH_SSH_ARGS_APPEND", "").split()
        self._options += ["-p", port] if port else []

    def signal(self, hosts: Sequence[str], number: int) -> list[Answer]:
        """Signal the run's ranks on the hosts that are not this one."""
        return self._ask(hosts, "signal", str(int(number)), 0)

    def end(self, hosts: Sequence[str], patience: float) -> list[Answer]:
        """End what is left of the run on the hosts that are not this one: SIGTERM, after `patience` seconds SIGKILL."""
        return self._ask(hosts, "end", str(patience), patience)

    def _ask(self, hosts: Sequence[str], action: str, argument: str, patience: float) -> list[Answer]:
        if not hosts:
            return []
        source = Path(marked.__file__).read_bytes()
        # The interpreter is where this one is, as DeepSpeed expects too; nothing in a home directory is imported.
        words = [sys.executable, "-IS", "-", action, self._mark, argument, marked.place()]
        ask = partial(self._ask_one, shlex.join(words), source, patience + BOUND_SECONDS)
        with ThreadPoolExecutor(min(_AT_ONCE, len(hosts))) as threads:
            return list(threads.map(ask, hosts))

    def _ask_one(self, command: str, source: bytes, bound: float, host: str) -> Answer:
        try:
            done = subprocess.run(
                ["ssh", *self._options, "--", host, command],
                input=source,
                capture_output=True,
                timeout=bound,
                start_new_session=True,  # A terminal's Ctrl-C is not for it.
            )
        except subprocess.TimeoutExpired:
            return Answer(host, trouble=f"no answer within {bound:.0f} s")
        except OSError as error:
            return Answer(host, trouble=f"ssh cannot be started: {error.strerror}")
        try:
            said = json.loads(done.stdout.splitlines()[-1])  # a login shell may have talked before
            count = said.get("signalled", said.get("ended", 0))
            return Answer(host, str(said["name"]), bool(said["here"]), int(count), int(said.get("killed", 0)))
        except (IndexError, ValueError, KeyError, TypeError, AttributeError):
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            return Answer(host, trouble=lines[-1] if lines else f"ssh ended with {done.returncode}")
