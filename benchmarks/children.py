"""Candidates in processes of their own: a heavy one gives all its memory back, and one that dies takes no other along.

A child is started with `serve(answer)` at its end. It is asked by lines of JSON on its standard input and answers in
lines that begin with a mark, among whatever else the libraries print. Children that fit beside each other wait for their
turn in one round after the other; where they do not fit, one is started for each turn.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runner import ROOT, Failed, reason

MARK = "answer: "


class Child:
    """`python SCRIPT …` on so many ranks of this host.

    Args:
        words: script and arguments.
        ranks: each a process; all hear every question, rank 0 answers.
        timeout: seconds for one answer; a child that takes longer is ended.
    """

    def __init__(
        self, words: Sequence[str], ranks: int = 1, timeout: float = 600, more: Mapping[str, str] | None = None
    ) -> None:
        self.timeout = timeout
        self.printed: deque[str] = deque(maxlen=60)
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])])
        shared = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(more or {})}
        if ranks > 1:
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
            shared |= {"LOCAL_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        self.processes = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, *words], env=shared | place, cwd=ROOT, text=True, start_new_session=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                    stderr=subprocess.STDOUT if rank == 0 else subprocess.DEVNULL,
                )
            )  # fmt: skip

    def ask(self, **question: Any) -> dict[str, Any]:
        """The answer to one question.

        Raises:
            Failed: the child failed, died or took too long; it is gone then.
        """
        late = threading.Timer(self.timeout, self.end)
        late.start()
        try:
            for process in self.processes:
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
            for line in self.processes[0].stdout:
                if line.startswith(MARK):
                    answer = json.loads(line.removeprefix(MARK))
                    if "error" in answer:
                        self.end()
                        raise Failed(answer["error"])
                    return answer
                self.printed.append(line.rstrip())
        except BrokenPipeError:
            self.printed.extend(line.rstrip() for line in self.processes[0].stdout)
        finally:
            late.cancel()
        raise Failed(self.death())

    def death(self) -> str:
        """How the child ended without an answer."""
        code = self.processes[0].wait()
        if code == -signal.SIGKILL:
            return f"killed: out of the host's memory, or slower than {self.timeout:g} s"
        words = [line for line in self.printed if line.strip()]
        return f"ended with {code}: {words[-1][:200] if words else 'nothing printed'}"

    def end(self) -> None:
        """End the processes of this child."""
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()


def free_port() -> int:
    """A port nobody listens on just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def serve(begin: Callable[[], Callable[..., Mapping[str, Any]]]) -> None:
    """In a child: build, then answer every line with what the function returns, until there are no more or one fails."""
    answer: Callable[..., Mapping[str, Any]] | None = None
    for line in sys.stdin:
        try:
            if answer is None:
                answer = begin()
            said = dict(answer(**json.loads(line)))
        except BaseException as error:
            said = {"error": reason(error)}
        print(f"\n{MARK}{json.dumps(said)}", flush=True)
        if "error" in said:
            break
    sys.stdout.flush()
    os._exit(0)  # process groups of several libraries are not worth an orderly end


def script(name: str) -> str:
    """A script of this folder."""
    return str(Path(__file__).resolve().parent / name)
