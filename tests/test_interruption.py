"""Signals are noted and not lost, a launcher that goes is seen, and nobody else's going is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT, environment
from vitds import dist
from vitds.interruption import SIGNALS, Interruption, parent_of

# Imports vitds.interruption and its like without the package's own imports, which take seconds.
LIGHT = f"""
import os, signal, subprocess, sys, time, types
package = types.ModuleType("vitds"); package.__path__ = [{str(ROOT / "vitds")!r}]; sys.modules["vitds"] = package
"""
RANK = (
    LIGHT
    + """
from vitds.interruption import Interruption
if "late" in sys.argv:
    parent = os.getppid()
    print("ready", os.getpid(), parent, flush=True)
    while os.getppid() == parent:
        os.sched_yield()
with Interruption() as interruption:
    if "late" not in sys.argv:
        print("ready", os.getpid(), os.getppid(), flush=True)
    for line in sys.stdin:
        print(interruption.reason, flush=True)
"""
)
PARENT = """
import subprocess, sys
sys.exit(subprocess.call(sys.argv[1:]))
"""
OTHERS = ("torchrun", "ssh and a shell", "nobody")
DEEPSPEEDS = {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "CROSS_RANK": "0", "CROSS_SIZE": "1"}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_a_signal_is_a_reason_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with Interruption() as interruption:
        assert interruption.reason is None
        os.kill(os.getpid(), number)
        assert interruption.reason == number.name
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interruption.reason == number.name, "the first one stays"
    assert signal.getsignal(number) == before


def test_the_second_sigint_is_pythons_own():
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert interruption.reason == "SIGINT"


def test_a_forked_child_is_not_made_immune():
    """SIGUSR1 and SIGINT of the group do nothing to it; SIGTERM, with which its parent would end it, does."""
    script = (
        LIGHT
        + """
from vitds.interruption import Interruption
with Interruption():
    if os.fork() == 0:
        for line in sys.stdin:
            print(os.getpid(), flush=True)
    print("ended by", os.WTERMSIG(os.wait()[1]), flush=True)
"""
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as it:
        child = int(ask(it))
        for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGINT):
            os.kill(child, number)
            assert int(ask(it)) == child
        os.kill(child, signal.SIGTERM)
        assert it.stdout.readline() == "ended by 15\n"


def ask(process: subprocess.Popen[str]) -> str:
    process.stdin.write("?\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def chain(tmp_path: Path, top: str) -> list[str]:
    """The command of a rank's grandparent; below it is launch.py, or in OTHERS something of another name."""
    launch = tmp_path / "deepspeed" / "launcher" / "launch.py"
    launch.parent.mkdir(parents=True)
    launch.write_text(PARENT)
    (tmp_path / "agent.py").write_text(PARENT)
    (tmp_path / "rank.py").write_text(RANK)
    parent = tmp_path / "agent.py" if top in OTHERS else launch
    below = [sys.executable, str(parent), sys.executable, "-u", str(tmp_path / "rank.py")]
    if top in ("runner", "torchrun", "nobody"):
        return [sys.executable, str(tmp_path / "agent.py"), *below]
    if "ssh" in top:  # where the remote shell has become the command
        (tmp_path / "session.py").write_text(f"import subprocess\nsubprocess.call({below!r})")
        return ["sshd: someone@notty", str(tmp_path / "session.py")]
    line = " ".join(below) + "; exit $?"
    if top == "pdsh":
        return ["bash", "-c", f"export A=b; cd {tmp_path}; {line}"]
    (tmp_path / "mine.sh").write_text(line)
    return ["bash", str(tmp_path / "mine.sh")]


def command_of(pid):
    """Empty for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


@pytest.mark.parametrize(
    ("top", "killed", "reason"),
    [
        ("runner", "grandparent", "the launcher is gone"),
        ("runner", "parent", "the launcher is gone"),
        ("pdsh", "grandparent", "the launcher is gone"),
        ("sshd", "grandparent", "the launcher is gone"),
        ("torchrun", "parent", "the launcher is gone"),
        ("torchrun", "grandparent", "None"),
        ("a shell with a script", "grandparent", "None"),
        ("late", "parent", "the launcher is gone"),
        ("ssh and a shell", "grandparent", "None"),
        ("nobody", "parent", "None"),
    ],
)
def test_the_chain_of_launchers(tmp_path, top, killed, reason):
    command = chain(tmp_path, "runner" if top == "late" else top)
    executable = sys.executable if "ssh" in top else None
    variables = {} if top == "nobody" else {"RANK": "0"} if top in OTHERS else DEEPSPEEDS
    with subprocess.Popen(
        command + (["late"] if top == "late" else []),
        executable=executable,
        env=environment() | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as it:
        words = it.stdout.readline().split()
        assert words[0] == "ready", words
        rank, parent = map(int, words[1:])
        assert parent_of(parent) == it.pid
        try:
            if top != "late":
                assert ask(it) == "None"
            child, gone = (rank, parent) if killed == "parent" else (parent, it.pid)
            os.kill(gone, signal.SIGKILL)
            if gone == it.pid:
                it.wait(30)
            while parent_of(child) == gone:
                os.sched_yield()
            assert ask(it) == reason
            assert ask(it) == reason
        finally:
            it.stdin.close()  # the rank ends, and with it its parents
    while b"rank.py" in command_of(rank):
        os.sched_yield()


def test_a_console_that_is_gone_stops_nobody(tmp_path):
    """`… | tee log` and Ctrl-C: tee goes first, and the run must still say so, save, and end with its own code."""
    body = 'print("saved"); print("saved", file=sys.stderr); dist.leave(75)'
    codes = []
    for prepare in ("", "interruption.outlive_the_console();"):
        reader, writer = os.pipe()
        os.close(reader)
        script = f"{LIGHT}\nfrom vitds import dist, interruption\n{prepare}{body}"
        codes.append(
            subprocess.run(
                [sys.executable, "-u", "-c", script], env=environment(), stdout=writer, stderr=writer
            ).returncode
        )
        os.close(writer)
    assert codes[0] != 75, "this test would prove nothing"
    assert codes[1] == 75


def test_any_rank_alone_is_its_input():
    assert dist.any_rank([True, False]) == [True, False]


def test_workers_of_a_loader_outlive_the_groups_signals(tmp_path):
    """Batches go on coming, and the loader closes, after SIGUSR1, SIGINT and SIGTERM to every process of the job."""
    script = """
import os, sys
from vitds.data import DataSection, SourceSection, TrainLoader
from vitds.data.digits import Digits
from vitds.interruption import Interruption
with Interruption() as interruption:
    section = DataSection(train=SourceSection("digits"), num_workers=2, prefetch=2)
    loader = TrainLoader(Digits(section.train, "train"), section, image_size=8, num_classes=10, seed=0, global_batch=4,
                         micro_batch=4, rank=0, world_size=1)
    next(loader)
    print("ready", flush=True)
    for line in sys.stdin:
        print([len(next(loader).labels) for _ in range(8)], interruption.reason, flush=True)
    loader.close()
    print("closed", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as it:
        assert it.stdout.readline() == "ready\n"
        for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
            os.killpg(it.pid, number)
            assert ask(it) == f"{[4] * 8} SIGUSR1"
        it.stdin.close()
        assert it.stdout.readline() == "closed\n"
        assert it.wait(60) == 0


def test_ranks_agree(tmp_path):
    """Element by element, over the default group where it is gloo, else over a gloo group made for it."""
    script = tmp_path / "rank.py"
    script.write_text(
        LIGHT
        + f"""
import json
import torch.distributed as group
from vitds import dist
rank = int(os.environ["RANK"])
group.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=rank, world_size=2)
found = [dist.any_rank([rank == 0, rank == 1, False])]
group.get_backend, default = lambda: "nccl", group.get_backend  # a second name for the same transport
dist._host_group = (None, None)
found += [dist.any_rank([False, rank == 1]), dist.any_rank([False, False])]
assert dist._host_group[1] is not group.group.WORLD
open(f"{tmp_path}/{{rank}}", "w").write(json.dumps(found))
dist.leave(0)
"""
    )
    ranks = [
        subprocess.Popen([sys.executable, str(script)], env=environment(RANK=str(r), WORLD_SIZE="2")) for r in "01"
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    for r in "01":
        assert json.loads((tmp_path / r).read_text()) == [[True, True, False], [False, True], [False, False]]
