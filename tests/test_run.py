"""`vitds run`: signals reach the ranks, codes tell the truth, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launching import DEEPSPEED, environment, free_port
from tests.test_interruption import LIGHT
from vitds.cli import main
from vitds.interruption import parent_of

RUN = LIGHT + "from vitds.cluster.supervise.attempt import run\nsys.exit(run(sys.argv[1:]))"

# In the trainer's place: agrees at its edges, "saves", writes outcome.json, exits 75.
TRAINER = (
    LIGHT
    + """
import json
import torch.distributed as group
from vitds import dist, interruption
interruption.outlive_the_console()
directory = sys.argv[sys.argv.index("--output-dir") + 1]
rank = os.environ["RANK"]
def write(name, value):
    with open(f"{directory}/{name}.new", "w") as file:
        json.dump(value, file)
    os.rename(f"{directory}/{name}.new", f"{directory}/{name}")
with interruption.Interruption() as interrupted:
    group.init_process_group("gloo")
    if rank == "0":
        write("outcome.json", {"state": "running", "exit_code": None, "time": time.time()})
    dist.barrier()
    write(f"ready-{rank}", {"pid": os.getpid(), "parent": os.getppid()})
    while not dist.any_rank([interrupted.reason is not None])[0]:
        time.sleep(0.01)
    write(f"saved-{rank}", interrupted.reason)
    dist.barrier()
    if rank == "0":
        write("outcome.json", {"state": "preempted", "exit_code": 75, "time": time.time()})
    dist.leave(75)
"""
)


def wait_for(what: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@contextmanager
def started(*command: str | Path, script: str = RUN, **more: str) -> Iterator[subprocess.Popen[str]]:
    """`vitds run` of a command, in a session of its own, as a terminal's foreground job."""
    words = [sys.executable, "-c", script, *map(str, command)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, env=environment(**more), text=True, start_new_session=True, **pipes) as it:
        try:
            yield it
        finally:
            it.kill()


def python(*statements: str) -> list[str]:
    """A command: these statements, with what they need."""
    return [
        sys.executable,
        "-u",
        "-c",
        "import json, os, select, signal, subprocess, sys, time\n" + "\n".join(statements),
    ]


def codes_of(command: list[str], *more: str) -> int:
    return subprocess.run(
        [sys.executable, "-c", RUN, *command, *more], env=environment(), capture_output=True, timeout=60
    ).returncode


def test_the_commands_own_code():
    assert codes_of(python("sys.exit(3)")) == 3
    assert codes_of(["--", *python("sys.exit(0)")]) == 0
    assert codes_of(python("os.kill(os.getpid(), signal.SIGKILL)")) == 137


@pytest.mark.parametrize("words", [["run"], ["run", "--"], ["run", "--", "no-such-command"], ["run", "/"]])
def test_no_command_is_one_line_and_exit_2(words, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("vitds: run: ") and said.count("\n") == 1
    assert words[-1] in said


@pytest.mark.parametrize(
    ("before", "written", "code", "returned"),
    [
        (None, {"state": "preempted", "exit_code": 75}, 1, 75),
        ("running", {"state": "preempted", "exit_code": 75}, 0, 75),
        ("preempted", None, 2, 2),  # the outcome of an earlier start
        ("running", None, 0, 0),
        (None, {"state": "running", "exit_code": None}, 0, 1),
        (None, {"state": "failed", "exit_code": 2}, 0, 2),
        (None, {"state": "finished", "exit_code": 0}, 0, 0),
        (None, {"state": "failed", "exit_code": 1}, 5, 5),
        (None, "torn", 4, 4),
    ],
)
@pytest.mark.parametrize("spelling", ["--output-dir {}", "--output-dir={}"])
def test_the_outcome_of_this_start_counts(tmp_path, before, written, code, returned, spelling):
    path = tmp_path / "outcome.json"
    if before is not None:
        path.write_text(json.dumps({"state": before, "exit_code": None}))
    statements = [f"open({str(path)!r}, 'w').write({json.dumps(written)!r}[:-1 if {written == 'torn'} else None])"]
    command = python(*(statements if written is not None else []), f"sys.exit({code})")
    assert codes_of(command, *spelling.format(tmp_path).split()) == returned


def test_before_there_are_ranks_the_command_is_ended(tmp_path):
    child = python("signal.pause()")
    command = python(f"child = subprocess.Popen({child!r})", "print(child.pid, flush=True)", "child.wait()")
    with started(*command) as it:
        child_pid = int(it.stdout.readline())
        it.send_signal(signal.SIGUSR1)
        assert it.wait(30) == 128 + signal.SIGTERM
        wait_for(lambda: not alive(child_pid))
        assert "SIGUSR1: no rank on this host; ending the command" in it.stderr.read()


# A rank that tells of each signal, its worker that does too, and ends when it is told to.
TELLS = """
def tell(number, frame):
    os.write(1, f"{who} {signal.Signals(number).name}\\n".encode())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, tell)
who = "rank"
worker = os.fork()
who = who if worker else "worker"
os.write(1, f"{who} {os.getpid()}\\n".encode())
if not worker:
    while True:
        signal.pause()
while not select.select([sys.stdin], [], [], 0.1)[0]:  # a signal just before a wait without end would go unseen
    pass
sys.stdin.readline()
os.kill(worker, signal.SIGKILL)
os._exit(7)
"""


@contextmanager
def started_rank() -> Iterator[tuple[subprocess.Popen[str], dict[str, int]]]:
    rank = python(TELLS)
    with started(*python(f"sys.exit(subprocess.call({rank!r}, env=os.environ | {{'RANK': '0'}}))")) as it:
        lines = [it.stdout.readline().split() for _ in range(2)]
        yield it, {name: int(pid) for name, pid in lines}


def test_ctrl_c_reaches_ranks_once_and_workers_and_launchers_not_at_all():
    with started_rank() as (it, _):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.killpg(it.pid, number)  # what a terminal does
            assert it.stdout.readline() == f"rank {number.name}\n"
        it.stdin.write("end\n")
        it.stdin.flush()
        assert it.wait(30) == 7
        assert it.stdout.read() == ""
        assert "SIGINT: passed to 1 rank(s), which save and stop; Ctrl-C again kills" in it.stderr.read()


def test_the_second_ctrl_c_kills():
    with started_rank() as (it, pids):
        it.send_signal(signal.SIGINT)
        assert it.stdout.readline() == "rank SIGINT\n"
        it.send_signal(signal.SIGINT)
        assert it.wait(30) == 137
        wait_for(lambda: not any(alive(pid) for pid in pids.values()))


def test_a_console_that_is_gone_does_not_keep_the_signal_from_the_ranks():
    with started_rank() as (it, _):
        it.stderr.close()
        it.send_signal(signal.SIGTERM)
        assert it.stdout.readline() == "rank SIGTERM\n"
        it.stdin.write("end\n")
        it.stdin.flush()
        assert it.wait(30) == 7


def test_ranks_that_outstay_the_command_are_waited_for_and_then_killed():
    patient = (
        LIGHT
        + "from vitds.cluster.supervise import attempt as run\nrun.PATIENCE_SECONDS = 1.0\nsys.exit(run.run(sys.argv[1:]))"
    )
    rank = python("print(os.getpid(), flush=True)", "signal.pause()")
    start = f"subprocess.Popen({rank!r}, env=os.environ | {{'RANK': '0'}}, start_new_session=True)"
    with started(*python(start), script=patient) as it:
        pid = int(it.stdout.readline())
        assert it.wait(30) == 0
        wait_for(lambda: not alive(pid))
        assert "1 process(es) still there" in it.stderr.read()


def test_ranks_on_other_hosts_are_waited_for(tmp_path):
    """They are not among our processes (here: nothing in their environment says so); their launcher goes, and they save."""
    write = f"open({str(tmp_path / 'outcome.json')!r}, 'w').write"
    rank = python(
        f"{write}(json.dumps({{'state': 'running'}}))",
        "print(os.getppid(), flush=True)",
        "sys.stdin.readline()",
        f"{write}(json.dumps({{'state': 'preempted'}}))",
    )
    command = python(f"subprocess.run({rank!r}, env={{'RANK': '0'}}, start_new_session=True)")
    with started(*command, "--output-dir", tmp_path) as it:
        launcher = int(it.stdout.readline())
        it.send_signal(signal.SIGTERM)
        wait_for(lambda: not alive(launcher))
        it.stdin.write("saved\n")
        it.stdin.flush()
        assert it.wait(30) == 75
        assert "no rank on this host" in it.stderr.read()


@pytest.mark.launch
@pytest.mark.parametrize(
    ("target", "number", "reasons", "returned"),
    [
        ("vitds run", signal.SIGTERM, ["SIGTERM", "SIGTERM"], 75),
        ("vitds run", signal.SIGKILL, ["the launcher is gone"] * 2, -9),
        ("runner", signal.SIGTERM, ["the launcher is gone"] * 2, 75),
        ("launch.py", signal.SIGKILL, ["the launcher is gone"] * 2, 75),
        ("rank 0", signal.SIGUSR1, ["SIGUSR1", None], 75),
    ],
    ids=lambda value: str(value) if isinstance(value, str | signal.Signals) else "",
)
def test_under_deepspeed_ranks_save_whatever_is_signalled(tmp_path, target, number, reasons, returned):
    trainer = tmp_path / "train.py"
    trainer.write_text(TRAINER)
    command = [DEEPSPEED, "--num_gpus", "2", "--master_port", free_port(), trainer, "--output-dir", tmp_path]
    with started("--", *command) as it:
        ready = [tmp_path / "ready-0", tmp_path / "ready-1"]
        wait_for(lambda: all(path.exists() for path in ready) or it.poll() is not None)
        assert it.poll() is None, it.stdout.read() + it.stderr.read()
        ranks = [json.loads(path.read_text()) for path in ready]
        launch = ranks[0]["parent"]
        pids = {"vitds run": it.pid, "runner": parent_of(launch), "launch.py": launch, "rank 0": ranks[0]["pid"]}
        os.kill(pids[target], number)
        printed = it.communicate(timeout=100)
        assert it.returncode == returned, printed
        wait_for(lambda: not any(map(alive, [*pids.values(), ranks[1]["pid"]])))
    found = [json.loads((tmp_path / f"saved-{rank}").read_text()) for rank in range(2)]
    # Both may have seen it themselves, or one has learnt it from the other.
    assert all(one in (reason, None) for one, reason in zip(found, reasons, strict=True)) and any(found), found
    assert json.loads((tmp_path / "outcome.json").read_text())["state"] == "preempted"
