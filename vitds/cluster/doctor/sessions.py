"""A Python script on many hosts at once over ssh, as DeepSpeed would start one there, within a bounded time."""

from __future__ import annotations

import json
import os
import re
import resource
import selectors
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from vitds.cluster.doctor.probe import MARK
from vitds.cluster.hostfile import check_host_name
from vitds.errors import UserError

FORWARDED = ("NCCL", "PYTHON", "MV2", "UCX", "MLFLOW")
"""Beginnings of the names of the variables that DeepSpeed's launcher (0.19) carries to the other hosts."""
_PLAIN = re.compile(r"([\w@%+=:,./^-]*)|'([^']*)'|\"([^\"$`\\]*)\"", re.A)
"""Values that a shell leaves as they are, but for the quotes around them."""
NO_DIRECTORY = 97
"""Exit code of a host that does not have the current directory."""
CONNECT_SECONDS = 10.0


@dataclass
class Answer:
    """What one host said."""

    host: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    started: float = 0.0
    received: list[float] = field(default_factory=list)
    """When each row came (Unix, s, this machine's clock)."""
    seconds: float = 0.0
    code: int | None = None
    """ssh's exit code, which is the script's unless it is 255; None: it was still running at the limit, and was ended."""
    said: str = ""
    """Last line of its standard error."""


def deepspeed_environment(environ: Mapping[str, str], directory: Path, home: Path) -> dict[str, str]:
    """The variables that `deepspeed --hostfile`, started in `directory`, exports on each host.

    Those of FORWARDED's names, `directory` in front of PYTHONPATH; then what .deepspeed_env (or the file that
    DS_ENV_FILE names) says: the one in `home`, and over it the one in `directory`.

    Raises:
        UserError: a line of such a file that DeepSpeed would end at with a ValueError, or that a shell would act on.
    """
    found = {name: value for name, value in environ.items() if name.startswith(FORWARDED) and name.isidentifier()}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(directory), environ.get("PYTHONPATH")]))
    for place in (home, directory):
        path = place / environ.get("DS_ENV_FILE", ".deepspeed_env")
        if not path.is_file():
            continue
        lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
        for number, line in enumerate(lines, 1):
            name, equals, value = (part.strip() for part in line.partition("="))
            where = f"{path}:{number}"
            if not equals or not name.isidentifier():
                raise UserError(f"{where}: {line!r} is not NAME=value; DeepSpeed ends at comments and empty lines")
            if not (plain := _PLAIN.fullmatch(value)):
                right = f"write {name}={shlex.quote(value)}, or what it stands for"
                raise UserError(f"{where}: DeepSpeed puts {value!r} into a shell's command line as it is; {right}")
            found[name] = next((text for text in plain.groups() if text is not None), "")
    return found


def ask(
    source: str,
    requests: Mapping[str, Mapping[str, Any]],
    environment: Mapping[str, str],
    limit: float,
    *,
    local: bool = False,
) -> list[Answer]:
    """Run a script on each host, and collect the rows that it prints after MARK.

    All at once, each over an ssh session of its own that asks for no password; what has not ended after `limit` seconds
    is ended here, and there by the script itself when its session is gone.

    Args:
        source: the script; it defines `main`.
        requests: {host: what its `main` is called with}.
        environment: set there first. The directory and the interpreter are those of this process.
        limit: seconds for all of it.
        local: run on this machine, without ssh (one host).
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if not local:  # whose limits are looked at
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and 3 * len(requests) + 64 > hard:
        raise UserError(
            f"doctor: {len(requests)} hosts need {3 * len(requests) + 64} open files, {hard} are allowed: ulimit -n"
        )
    # What Python reads before the script does; the rest comes with it, where no `ps` shows it.
    exports = "".join(f"export {n}={shlex.quote(v)}; " for n, v in environment.items() if n.startswith("PYTHON"))
    source += f"\nimport os\nos.environ.update({dict(environment)!r})\n"
    directory = shlex.quote(os.path.abspath("."))
    command = f"cd {directory} || exit {NO_DIRECTORY}; {exports}exec {shlex.quote(sys.executable)} -"
    patience = max(1, int(min(CONNECT_SECONDS, limit / 2)))
    ssh = ["ssh", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={patience}", "-o", "ServerAliveInterval=5"]
    ssh += ["-o", "ServerAliveCountMax=3", *os.environ.get("PDSH_SSH_ARGS_APPEND", "").split(), "--"]
    sessions = []
    with ExitStack() as stack, selectors.DefaultSelector() as ready:
        deadline = time.monotonic() + limit
        try:
            for host, request in requests.items():
                check_host_name(host, "doctor")
                words = ["sh", "-c", command] if local else [*ssh, host, command]
                streams = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(2)]
                sessions.append(session := _Session(host, words, f"{source}\nmain({dict(request)!r})\n", streams))
                ready.register(session.output, selectors.EVENT_READ, session)
            while ready.get_map() and (left := deadline - time.monotonic()) > 0:
                for key, _ in ready.select(left):
                    if not key.data.read():
                        ready.unregister(key.fileobj)
            for session in sessions:
                session.wait(deadline)
        finally:
            for session in sessions:
                session.end()
    return [session.answer for session in sessions]


class _Session:
    """One host's ssh."""

    def __init__(self, host: str, words: Sequence[str], program: str, streams: Sequence[IO[bytes]]) -> None:
        given, self._errors = streams
        given.write(program.encode())
        given.seek(0)
        self.answer = Answer(host, started=time.time())
        self._began = time.monotonic()
        self._rest = b""
        self._silent = False
        self._process = subprocess.Popen(
            words, stdin=given, stdout=subprocess.PIPE, stderr=self._errors, bufsize=0, start_new_session=True
        )
        assert self._process.stdout is not None
        self.output = self._process.stdout
        os.set_blocking(self.output.fileno(), False)

    def read(self) -> bool:
        """Take what has come; False at the end."""
        while chunk := self.output.read(65536):
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            for line in lines:
                _, mark, text = line.decode(errors="replace").rpartition(MARK)
                with suppress(ValueError):
                    if mark and isinstance(row := json.loads(text), dict):
                        self.answer.rows.append(row)
                        self.answer.received.append(time.time())
        self._silent = chunk is not None
        return not self._silent

    def wait(self, deadline: float) -> None:
        """Note the end; who has closed its output gets a moment for it even past the deadline."""
        if self._silent:
            with suppress(subprocess.TimeoutExpired):
                self.answer.code = self._process.wait(max(0.5, deadline - time.monotonic()))

    def end(self) -> None:
        """Kill what is left, and keep the last line of its errors."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.output.close()
        self.answer.seconds = time.monotonic() - self._began
        self._errors.seek(0)
        lines = self._errors.read()[-4000:].decode(errors="replace").strip().splitlines()
        self.answer.said = lines[-1].strip() if lines else ""
