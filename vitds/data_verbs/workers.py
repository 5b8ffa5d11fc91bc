"""The same work on many pieces, spread over processes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from types import FrameType
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
PIECES_AHEAD = 4
"""Pieces that each process may have waiting or done, so that what is held does not grow with the number of pieces."""

_work: Callable[[Any], Any]


def each(work: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Generator[Result, None, None]:
    """`work(task)` of each task, in the tasks' order; close the iterator where it is not read to its end.

    Args:
        work: inherited by the processes, not sent to them: it may hold what is large. Its results are sent.
        workers: number of processes; with 1 the work is done in this one.
    """
    if workers == 1:
        yield from map(work, tasks)
        return
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, fork, _begin, (work, os.getpid()))
    before = signal.signal(signal.SIGTERM, _leave) if threading.current_thread() is threading.main_thread() else None
    try:
        tasks = iter(tasks)
        waiting: deque[Future[Result]] = deque(
            pool.submit(_do, t) for t in itertools.islice(tasks, workers * PIECES_AHEAD)
        )
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(_do, task) for task in itertools.islice(tasks, 1))
    finally:
        children = list(pool._processes.values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in children:
            process.terminate()
        for process in children:
            process.join()
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _begin(work: Callable[[Any], Any], parent: int) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _do(task: Any) -> Any:
    return _work(task)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # through `finally`, which ends the processes
