"""Why this process should save and stop soon: a signal asked for it, or the launcher is gone.

Nothing heavy is imported here: a rank may watch for signals before it has.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO, cast

from vitds.launched import by_a_launcher

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LAUNCHER_IS_GONE = "the launcher is gone"
_LAUNCH_PY = r"deepspeed[./]launcher[./]launch(\.py)?"
_RUNNER = r"(.*/)?(deepspeed|ds|deepspeed[./]launcher[./]runner(\.py)?)"


class Interruption:
    """Notes SIGTERM, SIGUSR1 and SIGINT while it is entered, and sees when the launcher has gone.

    The signals only set a flag, which the training loop asks for where it can stop. A second SIGINT is Python's own
    (KeyboardInterrupt). The launcher of a rank (which is what has RANK in its environment) is gone when the rank has got
    another parent; and under DeepSpeed's launch.py also when launch.py has lost the `deepspeed` (or the ssh session)
    that started it, for launch.py itself never looks. Other ancestors may go: who logs out of a shell does not mean to
    stop what it left running.

    Enter it in the main thread, early: what has changed before cannot be seen. A child that is forked, not started
    anew, inherits the handlers: there SIGTERM ends it as ever, and SIGUSR1 and SIGINT, which are its parent's, do nothing.
    """

    def __init__(self) -> None:
        self._signal: str | None = None
        self._process = os.getpid()
        self._parent = os.getppid()
        self._launched = by_a_launcher(os.environ)
        """Asked at once: a process that nobody has launched may yet make itself rank 0 of one."""
        self._watched: int | None = None
        """launch.py's parent, where it is one that launch.py should not outlive."""
        self._gone = _launcher_went_before()
        if _is_launch_py(self._parent):
            above = parent_of(self._parent)
            if above is not None and _starts_launch_py(command_line(above)):
                self._watched = above
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            # None: it was not Python that had set the handler, and Python cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    @property
    def reason(self) -> str | None:
        """None, or the first of SIGTERM, SIGUSR1, SIGINT and "the launcher is gone". Seen by this process alone: no communication."""
        if self._signal is not None:
            return self._signal
        if self._launched and not self._gone:
            self._gone = os.getppid() != self._parent or (
                self._watched is not None and parent_of(self._parent) != self._watched
            )
        return LAUNCHER_IS_GONE if self._gone else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            if number == signal.SIGTERM:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)
            return
        if self._signal is None and not self._gone:
            self._signal = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def outlive_the_console() -> None:
    """From here on, what cannot be written to standard output or error is dropped instead of raising.

    Ctrl-C ends the `tee` behind a pipe together with the run, and a terminal may be closed: what a process prints on its
    way must then not keep it from saving.
    """
    sys.stdout = cast(TextIO, _Console(sys.stdout))
    sys.stderr = cast(TextIO, _Console(sys.stderr))


class _Console:
    """A text stream whose `write` and `flush` do not fail."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _launcher_went_before() -> bool:
    """Whether launch.py started this process and was gone before anybody could look: a rank imports for seconds."""
    if not {"CROSS_RANK", "LOCAL_SIZE", "LOCAL_RANK"} <= os.environ.keys():  # set by launch.py, by no other all three
        return False
    ancestor: int | None = os.getppid()
    while ancestor:
        if _is_launch_py(ancestor):
            return False
        ancestor = parent_of(ancestor)
    return ancestor == 0 and os.getppid() != 0  # None: /proc does not say; a parent 0: it is outside this container


def _is_launch_py(pid: int) -> bool:
    return any(re.fullmatch(rf"(.*/)?{_LAUNCH_PY}", word) for word in command_line(pid))


def _starts_launch_py(command: list[str]) -> bool:
    """Whether this is `deepspeed`, or a shell or wrapper with launch.py in its own command line (pdsh), or an ssh session.

    Any other shell may have left launch.py in the background and gone.
    """
    if not command:
        return False
    runner = any(re.fullmatch(_RUNNER, word) for word in command[:4])
    return runner or command[0].startswith("sshd") or any(re.search(_LAUNCH_PY, word) for word in command)


def command_line(pid: int) -> list[str]:
    """A process's command line; [] where it cannot be read."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def parent_of(pid: int) -> int | None:
    """A process's parent, or None: it has ended, or this system has no /proc."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, IndexError):
        return None
