"""`vitds run -- COMMAND …`: runs a launcher, and takes the signals for it.

`deepspeed` passes no signal on when it alone is signalled, and its launch.py gives the ranks 30 seconds. Here SIGTERM,
SIGUSR1 and SIGINT (Ctrl-C) go to the ranks themselves, on all hosts; the launchers are left to report how they ended.
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
from types import FrameType, TracebackType
from typing import Any

from vitds.cluster.hostfile import read_hostfile
from vitds.cluster.supervise import marked
from vitds.cluster.supervise.launcher import Launcher
from vitds.cluster.supervise.marked import MARK, send
from vitds.cluster.supervise.remote import KEEP_ALIVE, Answer, Remote
from vitds.errors import EXIT_PREEMPTED, UserError
from vitds.interruption import SIGNALS, outlive_the_console

PATIENCE_SECONDS = 60.0
"""How long after the command's end its ranks may go on saving: twice what DeepSpeed's launch.py would give them."""
END_SECONDS = 10.0
"""How long what is left of a run that has failed may take to end before it is killed."""
_LOOK_SECONDS = 2.0


def run(command: Sequence[str]) -> int:
    """Run `command` in a session of its own to its end, and pass SIGTERM, SIGUSR1 and SIGINT on to its ranks.

    Ranks are the processes with RANK in their environment whose parents have none, on this host and on those of the
    command's hostfile. If there are none (yet), the command itself is ended, and ranks elsewhere see that their launcher
    is gone. A second SIGINT kills everything at once. If this process is killed, the command gets SIGTERM.

    Returns:
        75 if outcome.json in the command's --output-dir says that this run was preempted and saved; otherwise the
        command's own code, 128 + n if signal n ended it. A launcher's 0 is not believed where outcome.json says that
        the run has not finished (DeepSpeed's runner returns 0 when its launch.py is killed).

    Raises:
        UserError: there is no command, or it cannot be started; its hostfile cannot be used.
    """
    launcher = Launcher(checked(command))
    mark = uuid.uuid4().hex
    hosts = [host.name for host in read_hostfile(launcher.hostfile)] if launcher.hostfile else []
    with Signals() as signals:
        job = Job(launcher, mark, Remote(mark, launcher.ssh_port), hosts)
        code = signals.follow(job)
        if code not in (0, EXIT_PREEMPTED):
            job.end_remote()
    return code


def checked(command: Sequence[str]) -> list[str]:
    """The command's words without a leading `--`.

    Raises:
        UserError: there are none.
    """
    words = list(command[1:] if command[:1] == ["--"] else command)
    if not words:
        raise UserError("run: no command; for example: vitds run -- deepspeed launcher/train.py --config …")
    return words


class Signals:
    """SIGTERM, SIGUSR1 and SIGINT, while it is entered: noted, and handed to the job of the moment."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The first of them."""
        self._job: Job | None = None
        self._before: dict[int, Any] = {}

    def follow(self, job: Job) -> int:
        """Run a job to its end, which is told of every signal meanwhile; the exit code that tells the truth."""
        self._job = job
        try:
            return job.wait()
        finally:
            self._job = None

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if self._job:
            self._job.interrupt(number)

    def __enter__(self) -> Signals:
        outlive_the_console()
        self._before = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class Job:
    """One command and the processes that come of it.

    Args:
        launcher: the command.
        mark: of its processes.
        remote, hosts: where there may be processes of it, as its hostfile names them; this host may be among them.
        overseen: end the command when it has outstayed its ranks.
    """

    def __init__(
        self, launcher: Launcher, mark: str, remote: Remote, hosts: Sequence[str] = (), overseen: bool = False
    ) -> None:
        self._words = launcher.words
        self._mark, self._remote, self._hosts, self._overseen = mark, remote, list(hosts), overseen
        self._outcome_file = launcher.output_dir / "outcome.json" if launcher.output_dir else None
        self._outcome_before = self._read_outcome()
        self._process: subprocess.Popen[bytes] | None = None
        self._early: int | None = None
        self._pending: list[tuple[int, bool]] = []
        """Signals for ranks on other hosts, and whether ranks here have got them; sent by `wait`, for a signal handler
        must not wait for a network."""
        self._ended = False
        """We have ended the command: there may be ranks on other hosts that save now."""
        self._keyboard = False
        self._had_ranks = False
        self._overdue: float | None = None
        self._looked = 0.0

    def wait(self) -> int:
        """Start the command and wait for its end and for its ranks'; the exit code that `run` returns."""
        environment = {**os.environ, MARK: self._mark}
        if self._hosts:
            own = os.environ.get("PDSH_SSH_ARGS_APPEND", "")
            environment["PDSH_SSH_ARGS_APPEND"] = f"{own} {KEEP_ALIVE}".strip()
        try:
            self._process = process = subprocess.Popen(
                self._words,
                env=environment,
                start_new_session=True,  # A terminal's Ctrl-C reaches it through us alone.
                preexec_fn=_end_with(os.getpid(), ctypes.CDLL(None)),
            )
        except OSError as error:
            raise UserError(f"run: {self._words[0]!r} cannot be started: {error.strerror}") from error
        if self._early is not None:
            self.interrupt(self._early)
        code = None
        while code is None:
            # Not one wait without end: a signal that comes just before it blocks would be seen only after it.
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(0.5)
            self._pass_on()
            if code is None and self._overseen:
                self._oversee()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (left := marked.left(self._mark)) or (self._ended and self.outcome().get("state") == "running"):
            if time.monotonic() > deadline:
                if left:
                    say(f"{len(left)} process(es) still there {PATIENCE_SECONDS:.0f} s after the command; killed")
                    send(left, signal.SIGKILL)
                else:
                    say(f"{self._outcome_file} still says running {PATIENCE_SECONDS:.0f} s after the command")
                break
            time.sleep(0.1)
            self._pass_on()
        return exit_code(code, self.outcome())

    def interrupt(self, number: int) -> None:
        """Take one signal. Runs as a signal handler, between two instructions of `wait`."""
        if self._process is None:
            self._early = number
            return
        name = signal.Signals(number).name
        if number == signal.SIGINT and self._keyboard:
            say("killed; the last complete checkpoint counts")
            self._signal_session(signal.SIGKILL)
            send(marked.marked(self._mark), signal.SIGKILL)
            self._pending.append((signal.SIGKILL, True))
            return
        self._keyboard |= number == signal.SIGINT
        again = "; Ctrl-C again kills" if number == signal.SIGINT else ""
        if ranks := marked.ranks(self._mark):
            say(f"{name}: passed to {len(ranks)} rank(s), which save and stop{again}")
            send(ranks, number)
        elif not self._hosts:
            say(f"{name}: no rank on this host; ending the command{again}")
            self._ended = True
            self._signal_session(signal.SIGTERM)
        self._pending.append((number, bool(ranks)))

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

    def end_remote(self) -> list[Answer]:
        """End what is left of the run on other hosts."""
        # Ranks whose launcher is gone may be saving just now; those of a run that has failed have nothing to save.
        patience = END_SECONDS if self.outcome().get("state") == "failed" else PATIENCE_SECONDS
        answers = self._remote.end(self._hosts, patience)
        for answer in answers:
            if answer.done:
                say(f"{answer.host}: ended {answer.done} process(es) left there, {answer.killed} of them killed")
        return answers

    def _pass_on(self) -> None:
        """Signal the ranks on other hosts; if there is none anywhere, end the command."""
        while self._pending:
            number, told_here = self._pending.pop(0)
            if not self._hosts:
                continue
            if number == signal.SIGKILL:
                self._remote.end(self._hosts, 0.0)
                continue
            answers = self._remote.signal(self._hosts, number)
            name = signal.Signals(number).name
            if told := [answer for answer in answers if answer.done]:
                say(f"{name}: passed to {', '.join(f'{answer.done} rank(s) on {answer.host}' for answer in told)}")
            elif not told_here and self._process and self._process.poll() is None:
                say(f"{name}: no rank on any host; ending the command")
                self._ended = any(answer.trouble for answer in answers)
                self._end_all()
            for answer in answers:
                if answer.trouble:
                    say(f"{name}: not passed to {answer.host}: {answer.trouble}")

    def _oversee(self) -> None:
        """End a command that has outstayed its ranks: they are gone from this host, or have said that they failed.

        `deepspeed` waits for the ssh session of a host that has died, and its launch.py for ranks that hang.
        """
        now = time.monotonic()
        if now < self._looked + _LOOK_SECONDS:
            return
        self._looked = now
        state, here = self.outcome().get("state"), bool(marked.ranks(self._mark))
        self._had_ranks |= here
        if state == "finished" or not (state == "failed" or (self._had_ranks and not here)):
            self._overdue = None
            return
        self._overdue = self._overdue or now
        if now - self._overdue < PATIENCE_SECONDS:
            return
        self._overdue = now
        why = "the run has failed" if state == "failed" else "its ranks on this host are gone"
        say(f"{why}, and the command has not ended within {PATIENCE_SECONDS:.0f} s; ending it")
        self._end_all()

    def _end_all(self) -> None:
        """End the command and what has come of it, on all hosts.

        Not by SIGTERM to the command: at that deepspeed's runner ends every launch.py on its hosts, other people's too.
        """
        assert self._process is not None
        self.end_remote()
        marked.end(self._mark, END_SECONDS)
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._signal_session(signal.SIGKILL)

    def _read_outcome(self) -> bytes | None:
        try:
            return self._outcome_file.read_bytes() if self._outcome_file else None
        except OSError:
            return None

    def _signal_session(self, number: int) -> None:
        assert self._process is not None
        with suppress(OSError):
            os.killpg(self._process.pid, number)


def exit_code(code: int, outcome: dict[str, Any]) -> int:
    """What `run` returns, from the command's return code as subprocess gives it and what outcome.json says."""
    if outcome.get("state") == "preempted":
        return EXIT_PREEMPTED
    if code == 0 and outcome.get("state") in ("running", "failed"):
        return int(outcome.get("exit_code") or 1)
    return 128 - code if code < 0 else code


def _end_with(parent: int, libc: ctypes.CDLL) -> Any:
    """What a child does before it becomes the command: ask Linux for SIGTERM should `parent` end first."""

    def ask() -> None:
        libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(128 + signal.SIGTERM)

    return ask


def say(text: str) -> None:
    """One line on standard error."""
    print(f"vitds run: {text}", file=sys.stderr, flush=True)
