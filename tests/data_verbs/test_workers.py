"""Work that is spread over processes: results in order, errors as they are, and nobody is left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from vitds.data_verbs.workers import each
from vitds.errors import Stopped, UserError


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order(workers):
    large = list(range(1000))
    assert list(each(lambda i: (large[i], i % 7), iter(range(100)), workers)) == [(i, i % 7) for i in range(100)]


def test_tasks_are_taken_as_results_are():
    taken = []
    tasks = (taken.append(i) or i for i in range(10_000))
    with contextlib.closing(each(lambda i: i, tasks, 2)) as results:
        assert next(results) == 0
        assert len(taken) < 20


def test_an_error_ends_the_work():
    def work(i):
        if i == 5:
            raise UserError("number 5 is bad")
        return os.getpid()

    pids: set[int] = set()
    with pytest.raises(UserError, match="number 5 is bad"):
        pids.update(each(work, range(50), 2))
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_killed_worker_is_told():
    with pytest.raises(Stopped, match=r"a worker was killed \(signal 9\)"):
        list(each(lambda i: os.kill(os.getpid(), signal.SIGKILL) if i == 3 else i, range(50), 2))


FAILING = """
import signal
from vitds.data_verbs.workers import each
signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as the verbs have it
def work(i):
    raise ValueError(i)
for _ in range(40):
    try:
        list(each(work, range(50), 2))
    except ValueError:
        pass
print("survived")
"""


def test_an_error_is_told_where_sigpipe_ends_a_program():
    found = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "survived\n"), found.stderr


LARGE_RESULTS = """
import sys
from vitds.data_verbs.workers import each
for result in each(lambda i: bytes(1 << 24), range(1000), 2):
    print("one", flush=True)
    break
sys.exit(5)
"""


def test_ending_amid_large_results_does_not_hang():
    found = subprocess.run(
        [sys.executable, "-c", LARGE_RESULTS], capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode == 5, found.stderr


SLEEPERS = """
import os, signal, sys, time
from vitds.data_verbs.workers import each
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
def work(i):
    os.write(1, b"%d\\n" % os.getpid())  # in one piece
    time.sleep(600)
list(each(work, range(2), 2))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_their_parent(number):
    parent = subprocess.Popen(
        [sys.executable, "-c", SLEEPERS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    parent.send_signal(number)
    parent.wait(timeout=60)
    deadline = time.monotonic() + 60
    while any(map(_runs, pids)):
        assert time.monotonic() < deadline, pids
        time.sleep(0.05)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
