"""The same work on many pieces, spread over processes.

Each process has a pipe of its own. Python's ProcessPoolExecutor puts all results into one: ended in the midst of a result
it leaves its parent reading for ever, and ended at all it writes where nobody reads (SIGPIPE, which ends a verb without a word).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, TypeVar, cast

from vitds.errors import Stopped

ENDING = {signal.SIGINT, signal.SIGTERM}
Task = TypeVar("Task")
Result = TypeVar("Result")
PIECES_AHEAD = 4
"""Pieces for each process that may be given out before their results are taken, so that what is held does not grow with
the number of pieces."""


def each(work: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Generator[Result, None, None]:
    """`work(task)` of each task, in the tasks' order; close the iterator where it is not read to its end.

    Args:
        work: inherited by the processes, not sent to them: it may hold what is large. Its results are sent.
        workers: number of processes; with 1 the work is done in this one.

    Raises:
        Stopped: a process was killed.
    """
    if workers == 1:
        yield from map(work, tasks)
        return
    team: dict[Connection, BaseProcess] = {}
    idle: list[Connection] = []
    done: dict[int, tuple[Result, Exception | None]] = {}
    numbered = enumerate(tasks)
    given = taken = 0
    handlers: dict[int, Any] = {signal.SIGTERM: _leave, signal.SIGPIPE: signal.SIG_IGN}
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()} if main else {}
    try:
        while True:
            while given - taken < workers * PIECES_AHEAD and (idle or len(team) < workers):
                task = next(numbered, None)
                if task is None:
                    break
                if not idle:
                    idle.append(_start(work, team))
                connection = idle.pop()
                with _alive(team[connection]):
                    connection.send(task)
                given += 1
            if taken in done:
                result, error = done.pop(taken)
                if error is not None:
                    raise error
                taken += 1
                yield result
            elif taken == given:
                return
            else:
                for connection in cast(list[Connection], wait([one for one in team if one not in idle])):
                    with _alive(team[connection]):
                        number, result, error = connection.recv()
                    done[number] = result, error
                    idle.append(connection)
    finally:
        for process in team.values():
            process.kill()  # they clean up nothing; SIGTERM is lost on one that is just putting handlers in place
        for connection, process in team.items():
            process.join()
            connection.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(work: Callable[[Any], Any], team: dict[Connection, BaseProcess]) -> Connection:
    """The pipe of one more process of the team."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(work, theirs, os.getpid()), daemon=True)
    # A signal that the process got before it has handlers of its own would raise there what it raises here, and a copy of
    # this program would go on from the midst of it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    theirs.close()  # or the end of the process would not be the end of what can be read
    team[ours] = process
    return ours


def _serve(work: Callable[[Any], Any], connection: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # SIGPIPE stays ignored: the error it leaves is told apart below
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        while True:
            number, task = connection.recv()
            result, failed = None, None
            try:
                result = work(task)
            except Exception as error:
                error.add_note(traceback.format_exc())
                failed = error
            connection.send((number, result, failed))


@contextlib.contextmanager
def _alive(process: BaseProcess) -> Iterator[None]:
    """Says so where the process at the other end of a pipe is not."""
    try:
        yield
    except (EOFError, OSError):
        process.join()
        code = process.exitcode or 0
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise Stopped(f"a worker was killed ({how}), perhaps for want of memory; try fewer --workers") from None


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # through `finally`, which ends the processes
