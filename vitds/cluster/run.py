"""`vitds run -- COMMAND …`: runs a launcher, and takes the signals for it.

`deepspeed` passes no signal on when it alone is signalled, and its launch.py gives the ranks 30 seconds. Here SIGTERM,
SIGUSR1 and SIGINT (Ctrl-C) go to the ranks themselves; the launchers are left to report how they ended.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from vitds.errors import EXIT_PREEMPTED, UserError
from vitds.interruption import SIGNALS, command_line, outlive_the_console, parent_of

PATIENCE_SECONDS = 60.0
"""How long after the command's end its ranks may go on saving: twice what DeepSpeed's launch.py would give them."""
_MARK = "VITDS_RUN"
"""Environment variable by which the processes of one command are known, also when their parents are gone."""


def run(command: Sequence[str]) -> int:
    """Run `command` in a session of its own to its end, and pass SIGTERM, SIGUSR1 and SIGINT on to its ranks.

    Ranks are the processes of this host with RANK in their environment whose parents have none. If there are none (not
    yet, or they are on other hosts), the command itself is ended, and ranks elsewhere see that their launcher is gone.
    A second SIGINT kills everything at once. If this process is killed, the command gets SIGTERM.

    Returns:
        75 if outcome.json in the command's --output-dir says that this run was preempted and saved; otherwise the
        command's own code, 128 + n if signal n ended it. A launcher's 0 is not believed where outcome.json says that
        the run has not finished (DeepSpeed's runner returns 0 when its launch.py is killed).

    Raises:
        UserError: there is no command, or it cannot be started.
    """
    words = list(command[1:] if command[:1] == ["--"] else command)
    if not words:
        raise UserError("run: no command; for example: vitds run -- deepspeed launcher/train.py --config …")
    job = _Job(words)
    handlers = {number: signal.signal(number, job.interrupt) for number in SIGNALS}
    try:
        code = job.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    said = job.outcome()
    if said.get("state") == "preempted":
        return EXIT_PREEMPTED
    if code == 0 and said.get("state") in ("running", "failed"):
        return int(said.get("exit_code") or 1)
    return 128 - code if code < 0 else code


class _Job:
    """One command and the processes that come of it."""

    def __init__(self, words: list[str]) -> None:
        self._words = words
        self._mark = uuid.uuid4().hex
        self._outcome_file = _outcome_file(words)
        self._outcome_before = self._read_outcome()
        self._process: subprocess.Popen[bytes] | None = None
        self._early: int | None = None
        self._ended = False
        """We have ended the command: there may be ranks on other hosts that save now."""
        self._keyboard = False

    def wait(self) -> int:
        """Start the command and wait for its end and for its ranks'; its return code as subprocess gives it."""
        try:
            self._process = process = subprocess.Popen(
                self._words,
                env={**os.environ, _MARK: self._mark},
                start_new_session=True,  # A terminal's Ctrl-C reaches it through us alone.
                preexec_fn=_end_with(os.getpid(), ctypes.CDLL(None)),
            )
        except OSError as error:
            raise UserError(f"run: {self._words[0]!r} cannot be started: {error.strerror}") from error
        outlive_the_console()
        if self._early is not None:
            self.interrupt(self._early)
        code = None
        while code is None:
            # Not one wait without end: a signal that comes just before it blocks would be seen only after it.
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(1)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (left := self._left()) or (self._ended and self.outcome().get("state") == "running"):
            if time.monotonic() > deadline:
                if left:
                    _say(f"{len(left)} process(es) still there {PATIENCE_SECONDS:.0f} s after the command; killed")
                    _signal(left, signal.SIGKILL)
                else:
                    _say(f"{self._outcome_file} still says running {PATIENCE_SECONDS:.0f} s after the command")
                break
            time.sleep(0.1)
        return code

    def interrupt(self, number: int, frame: FrameType | None = None) -> None:
        """Take one signal. Runs as a signal handler, between two instructions of `wait`."""
        if self._process is None:
            self._early = number
            return
        name = signal.Signals(number).name
        if number == signal.SIGINT and self._keyboard:
            _say("killed; the last complete checkpoint counts")
            self._signal_session(signal.SIGKILL)
            _signal(self._marked(), signal.SIGKILL)
            return
        self._keyboard |= number == signal.SIGINT
        again = "; Ctrl-C again kills" if number == signal.SIGINT else ""
        if ranks := self._ranks():
            _say(f"{name}: passed to {len(ranks)} rank(s), which save and stop{again}")
            _signal(ranks, number)
        else:
            _say(f"{name}: no rank on this host; ending the command{again}")
            self._ended = True
            self._signal_session(signal.SIGTERM)

    def outcome(self) -> dict[str, Any]:
        """outcome.json, if it has been written since the command started; otherwise {}."""
        text = self._read_outcome()
        if text is None or text == self._outcome_before:
            return {}
        try:
            said = json.loads(text)
        except ValueError:
            return {}
        return said if isinstance(said, dict) else {}

    def _read_outcome(self) -> bytes | None:
        try:
            return self._outcome_file.read_bytes() if self._outcome_file else None
        except OSError:
            return None

    def _signal_session(self, number: int) -> None:
        assert self._process is not None
        with suppress(OSError):
            os.killpg(self._process.pid, number)

    def _marked(self) -> dict[int, bool]:
        """The living processes of this command on this host: {pid: whether it has RANK in its environment}."""
        found, mark = {}, f"{_MARK}={self._mark}".encode()
        for entry in os.scandir("/proc"):
            if not entry.name.isdigit():
                continue
            try:
                variables = Path(entry.path, "environ").read_bytes().split(b"\0")
            except OSError:  # it has ended, or is another user's
                continue
            if mark in variables:
                found[int(entry.name)] = any(variable.startswith(b"RANK=") for variable in variables)
        return found

    def _ranks(self) -> list[int]:
        marked = self._marked()
        return [pid for pid, has_rank in marked.items() if has_rank and not marked.get(parent_of(pid) or 0)]

    def _left(self) -> list[int]:
        """What a run is made of: ranks, their workers and DeepSpeed's launchers. Anything else may outlive the command."""
        return [
            pid
            for pid, has_rank in self._marked().items()
            if has_rank or any("deepspeed.launcher" in word for word in command_line(pid))
        ]


def _outcome_file(words: list[str]) -> Path | None:
    """outcome.json of the last --output-dir among the words of a command."""
    found = None
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == "--output-dir" and following is not None:
            found = following
        elif word.startswith("--output-dir="):
            found = word.partition("=")[2]
    return Path(found, "outcome.json") if found else None


def _end_with(parent: int, libc: ctypes.CDLL) -> Any:
    """What a child does before it becomes the command: ask Linux for SIGTERM should `parent` end first."""

    def ask() -> None:
        libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(128 + signal.SIGTERM)

    return ask


def _signal(pids: Sequence[int] | dict[int, bool], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _say(text: str) -> None:
    print(f"vitds run: {text}", file=sys.stderr, flush=True)
