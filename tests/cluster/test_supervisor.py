"""`vitds run --max-restarts`: what is started again, what is given up, on which hosts, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import Hosts, two_hosts, why_not
from tests.launching import environment
from tests.test_interruption import LIGHT
from tests.test_run import TRAINER, alive, wait_for
from vitds.cluster.hostfile import Host
from vitds.cluster.supervise.launcher import Launcher
from vitds.cluster.supervise.pool import Pool, fitted
from vitds.cluster.supervise.remote import Answer
from vitds.cluster.supervise.verdict import Attempt, Limits, verdict

# The verb with short patience, without the package's own imports, which take seconds.
RUN = (
    LIGHT
    + """
import argparse
from vitds.errors import UserError
from vitds.cluster.supervise import remote
from vitds.cluster.supervise import attempt as run
from vitds.cluster.supervise import supervisor
run.PATIENCE_SECONDS, run.END_SECONDS, remote.CONNECT_SECONDS = 1.0, 1.0, 2
parser = argparse.ArgumentParser()
supervisor.add_verb(parser.add_subparsers())
try:
    sys.exit(supervisor.run(parser.parse_args(["run", *sys.argv[1:]])))
except UserError as error:
    sys.exit(print(f"vitds: {error}", file=sys.stderr) or 2)
"""
)
# Plays `deepspeed` and its trainer: does what the plan says for this attempt, and notes how it was started.
LAUNCHER = (
    f"#!{sys.executable}"
    + """
import json, os, signal, subprocess, sys, time
directory = sys.argv[sys.argv.index("--output-dir") + 1]
plan = json.load(open(f"{directory}/plan.json"))
number = len([name for name in os.listdir(directory) if name.startswith("attempt-")])
step = plan[min(number, len(plan) - 1)]
def write(name, value):
    with open(f"{directory}/{name}.new", "w") as file:
        json.dump(value, file)
    os.rename(f"{directory}/{name}.new", f"{directory}/{name}")
if "left" in step:  # a rank that ignores SIGTERM and outlives its launcher
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    env = os.environ | {"RANK": "0"}
    left = subprocess.Popen([sys.executable, "-c", code], env=env, start_new_session=True, stdout=subprocess.PIPE)
    left.stdout.readline()
    step["left"] = left.pid
if "remote" in step:  # such a rank on another host, started as pdsh would
    code = "import os, signal, sys; signal.signal(15, signal.SIG_IGN); print(os.getpid(), flush=True); signal.pause()"
    exported = f"PYTHON_VITDS_RUN={os.environ['PYTHON_VITDS_RUN']} RANK=1"
    command = f"{exported} setsid {sys.executable} -c '{code}' < /dev/null"
    remote = subprocess.Popen(["ssh", step["remote"], command], stdout=subprocess.PIPE, start_new_session=True)
    step["left"] = int(remote.stdout.readline())
for number_of_step in step.get("checkpoints", []):
    os.makedirs(f"{directory}/checkpoints/step-{number_of_step:09d}")
for row in step.get("events", []):
    with open(f"{directory}/events.jsonl", "a") as file:
        file.write(json.dumps(row) + "\\n")
if "outcome" in step:
    write("outcome.json", step["outcome"] | {"time": time.time()})
write(f"attempt-{number}", {"argv": sys.argv, "pid": os.getpid(), "left": step.get("left")})
if step.get("waits"):
    os.environ["RANK"] = "0"  # of a process that is started now
    noted = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(9)); print(flush=True)\\nwhile True: time.sleep(0.02)"
    rank = subprocess.Popen([sys.executable, "-c", "import signal, sys, time\\n" + noted], stdout=subprocess.PIPE)
    rank.stdout.readline()
    write("ready", {"rank": rank.pid})
    rank.wait()
    write("outcome.json", {"state": "preempted", "exit_code": 75, "step": 3, "time": time.time()})
sys.exit(step.get("code", 0))
"""
)

FINISHED = {"outcome": {"state": "finished", "exit_code": 0, "step": 12}}
CRASH = {"outcome": {"state": "failed", "exit_code": 1, "step": 4}, "code": 1}


class Supervised:
    """A run directory, a plan and a launcher that follows it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.output = directory / "run"
        self.output.mkdir(parents=True)
        self.launcher = directory / "deepspeed"
        self.launcher.write_text(LAUNCHER)
        self.launcher.chmod(0o755)

    def plan(self, *attempts: dict[str, Any]) -> None:
        (self.output / "plan.json").write_text(json.dumps(attempts))

    def words(self, *options: object, launcher: tuple[object, ...] = ()) -> list[str]:
        options = (*(["--backoff", 0.05] if options else []), *options)
        command = [self.launcher, *launcher, "train.py", "--output-dir", self.output]
        return list(map(str, [sys.executable, "-c", RUN, *options, "--", *command]))

    @contextmanager
    def started(self, *options: object, launcher: tuple[object, ...] = ()) -> Iterator[subprocess.Popen[str]]:
        words = self.words(*options, launcher=launcher)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(words, env=environment(), text=True, start_new_session=True, **pipes) as it:
            try:
                yield it
            finally:
                it.kill()

    def run(self, *options: object, launcher: tuple[object, ...] = ()) -> tuple[int, str]:
        with self.started(*options, launcher=launcher) as it:
            said = it.communicate(timeout=100)[1]
            return it.returncode, said

    def attempts(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.output.glob("attempt-?"))]

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        path = self.output / "events.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if row["kind"] in kinds]


@pytest.fixture
def supervised(tmp_path: Path) -> Supervised:
    return Supervised(tmp_path)


# ---- the verdict ----------------------------------------------------------------------------------------------------

FAILED = Attempt(code=1, reason="RuntimeError: x", state="failed", said_code=1, step=4, hosts=("a", "b"))
THREE = Limits(max_restarts=3, window=100.0, backoff=5.0)


@pytest.mark.parametrize(
    ("last", "what"),
    [
        (FAILED, "restart"),
        (replace(FAILED, state=None, said_code=None, code=137), "restart"),
        (replace(FAILED, state="running", said_code=None, code=2), "restart"),  # rank 0 was lost; 2 is some launcher's
        (replace(FAILED, state=None, said_code=None, code=0), "restart"),  # DeepSpeed's 0 when its launch.py is killed
        (replace(FAILED, state="finished", said_code=0, code=0), "done"),
        (replace(FAILED, state="finished", said_code=0, code=134), "done"),
        (replace(FAILED, said_code=2), "give up"),
        (replace(FAILED, state=None, said_code=None, code=2), "give up"),
        (replace(FAILED, signalled=True), "done"),
        (replace(FAILED, state="preempted", said_code=75, code=75, signalled=True), "done"),
        (replace(FAILED, state="preempted", said_code=75, code=75, preempted_by="the launcher is gone"), "restart"),
        (replace(FAILED, state="preempted", said_code=75, code=75, preempted_by="SIGTERM"), "restart"),
        (replace(FAILED, state="preempted", said_code=75, code=75, preempted_by="SIGUSR1"), "done"),
        (replace(FAILED, state="preempted", said_code=75, code=75, preempted_by="SIGINT"), "done"),
    ],
)
def test_what_one_end_means(last: Attempt, what: str) -> None:
    assert verdict([last], THREE).what == what
    assert verdict([last], replace(THREE, max_restarts=0)).what == ("give up" if what == "restart" else what)


def ends(*changes: dict[str, Any]) -> list[Attempt]:
    """One failure every 1000 s, each with a reason of its own, but for these changes."""
    return [
        replace(FAILED, **{"ended": 1000.0 * i, "reason": f"reason {'abcdefghij'[i]}"} | change)
        for i, change in enumerate(changes)
    ]


def test_restarts_in_a_row_are_counted_from_the_last_new_checkpoint() -> None:
    assert [verdict(ends(*[{}] * n), THREE).what for n in (1, 2, 3, 4)] == ["restart"] * 3 + ["give up"]
    assert "3 restart(s) in a row without a new checkpoint" in verdict(ends(*[{}] * 4), THREE).reason
    assert verdict(ends({}, {}, {}, {"advanced": True}), THREE).what == "restart"
    assert verdict(ends({}, {"advanced": True}, {}, {}), THREE).what == "restart"
    assert verdict(ends({"advanced": True}, {}, {}, {}), THREE).what == "give up"
    waits = [verdict(ends(*[{}] * n), replace(THREE, max_restarts=20)).wait for n in (1, 2, 3, 9)]
    assert waits == [5, 10, 20, 300]
    assert verdict(ends({}, {}, {"advanced": True}), THREE).wait == 5


def test_within_the_window_new_checkpoints_do_not_help() -> None:
    quick = [{"advanced": True, "ended": 30.0 * i} for i in range(5)]
    assert verdict(ends(*quick[:3]), THREE).what == "restart"
    assert "3 restart(s) within 100 s" in verdict(ends(*quick[:4]), THREE).reason
    slow = [{"advanced": True, "ended": 40.0 * i} for i in range(5)]
    assert verdict(ends(*slow), THREE).what == "restart", "only two of the others lie within 100 s"
    assert verdict(ends(*quick), replace(THREE, window=0.0)).what == "restart"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({}, "give up"),
        ({"reason": "RuntimeError: x at 0x7f2 after 3.5 s"}, "give up"),
        ({"reason": "OSError: x"}, "restart"),
        ({"step": 8}, "restart"),
        ({"hosts": ("a",)}, "restart"),
        ({"started": False}, "restart"),  # nobody answered: that is no failure of the program
    ],
)
def test_the_same_failure_three_times_is_given_up(change: dict[str, Any], what: str) -> None:
    many = Limits(max_restarts=100)
    first = replace(FAILED, reason="RuntimeError: x at 0x1 after 2 s") if "0x" in str(change) else FAILED
    found = verdict([first, replace(first, **change), first], many)
    assert found.what == what
    assert verdict([first, first], many).what == "restart"
    if what == "give up":
        assert "the same failure 3 times in a row at step 4: RuntimeError: x" in found.reason


# ---- the command and the hosts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "hostfile", "replaced"),
    [
        ("deepspeed --hostfile h t.py --hostfile x", "h", "deepspeed --hostfile new t.py --hostfile x"),
        ("/a/deepspeed --hostfile=h --num_gpus 2 t.py", "h", "/a/deepspeed --hostfile new --num_gpus 2 t.py"),
        ("deepspeed --force_multi -H h t.py -H x", "h", "deepspeed --hostfile new --force_multi t.py -H x"),
        ("deepspeed -Hh --module t -H x", "h", "deepspeed --hostfile new --module t -H x"),
        (
            "python -m deepspeed.launcher.runner -H h t.py",
            "h",
            "python -m deepspeed.launcher.runner --hostfile new t.py",
        ),
        ("env A=1 deepspeed -H a -H b t.py", "b", "env A=1 deepspeed --hostfile new t.py"),
        ("deepspeed t.py --hostfile h", None, None),
        ("deepspeed --num_gpus 2 t.py", None, None),
        ("deepspeed --no_ssh --hostfile h t.py", None, None),
        ("deepspeed --launcher slurm --hostfile h t.py", None, None),
        ("torchrun --hostfile h t.py", None, None),
    ],
)
def test_the_hostfile_of_a_command(command: str, hostfile: str | None, replaced: str | None) -> None:
    launcher = Launcher(command.split())
    assert (str(launcher.hostfile) if launcher.hostfile else None) == hostfile
    if replaced:
        assert " ".join(launcher.with_hostfile(Path("new"))) == replaced


def test_hosts_are_known_by_any_of_their_names() -> None:
    pool = Pool([Host("gpu-1.example.org", 8), Host("10.0.0.2", 8), Host("gpu-3", 8)], drop_after=2)
    assert pool.blamed(["gpu-1", "gpu-3.example.org"]) == {"gpu-1.example.org", "gpu-3"}
    assert pool.blamed(["gpu-2", "10"]) == set()
    pool.learn([Answer("10.0.0.2", "gpu-2.example.org")])
    assert pool.blamed(["gpu-2"]) == {"10.0.0.2"}
    assert pool.blamed(["gpu-1", "gpu-2", "gpu-3"]) == set(), "all of them is none of them"
    assert pool.charge(["gpu-3"]) == [] and pool.charge(["gpu-3"]) == ["gpu-3"]
    assert pool.candidates == ["gpu-1.example.org", "10.0.0.2"]


@pytest.mark.parametrize(
    ("slots", "batch", "micro", "kept"),
    [
        ([8, 8], 64, 1, [8, 8]),
        ([8] * 7, 4096, 64, [8] * 4),
        ([8] * 3, 96, 1, [8] * 3),
        ([4, 4, 4], 96, 24, [4]),
        ([2, 2, 1], 24, 1, [2, 2]),
        ([3, 2], 24, 6, [3, 1]),
        ([2, 2], 3, 2, [2, 2]),  # nothing fits; the trainer says what would
    ],
)
def test_slots_are_chosen_so_that_the_batch_divides(slots: list[int], batch: int, micro: int, kept: list[int]) -> None:
    hosts = [Host(f"h{i}", n) for i, n in enumerate(slots)]
    assert [host.slots for host in fitted(hosts, batch, micro)] == kept


# ---- the loop -------------------------------------------------------------------------------------------------------


def test_crashes_are_started_again_until_the_run_finishes(supervised: Supervised) -> None:
    fail = {"kind": "fail", "reason": "ValueError: first\nand more"}
    left = {**CRASH, "left": True, "checkpoints": [4]}
    supervised.plan(
        {**left, "events": [fail]}, {"outcome": {"state": "running", "exit_code": None}, "code": 0}, FINISHED
    )
    code, said = supervised.run("--max-restarts", 5)
    assert code == 0, said
    rows = supervised.events("restart", "give up", "drop host")
    assert [(row["kind"], row["attempt"], row["step"], row["exit_code"]) for row in rows] == [
        ("restart", 2, 4, 1),
        ("restart", 3, 4, 1),
    ]
    assert rows[0]["reason"] == "ValueError: first"
    assert "attempt 1: ValueError: first; restart in 0.05 s" in said
    assert said.splitlines()[-1].startswith("vitds run: finished after 3 attempt(s) in ")
    first, *others = supervised.attempts()
    assert len(others) == 2 and not alive(first["left"]), "what an attempt leaves does not live to see the next"


def test_without_max_restarts_nothing_is_started_again(supervised: Supervised) -> None:
    supervised.plan(CRASH, FINISHED)
    assert supervised.run()[0] == 1
    assert len(supervised.attempts()) == 1 and not supervised.events("restart", "give up")


@pytest.mark.parametrize(
    "attempt",
    [
        {"code": 2},
        {"outcome": {"state": "failed", "exit_code": 2, "step": 0}, "code": 1},
        {"outcome": {"state": "failed", "exit_code": 2, "step": 0}, "code": 0},
    ],
)
def test_what_the_user_got_wrong_is_not_tried_again(supervised: Supervised, attempt: dict[str, Any]) -> None:
    supervised.plan(attempt, FINISHED)
    code, said = supervised.run("--max-restarts", 5)
    assert code == 2 and len(supervised.attempts()) == 1
    assert "giving up: the input is wrong (exit code 2)" in said
    assert [row["exit_code"] for row in supervised.events("give up")] == [attempt["code"] or 2]


def test_a_crash_that_comes_again_and_again_is_given_up_with_its_reason(supervised: Supervised) -> None:
    supervised.plan({**CRASH, "events": [{"kind": "fail", "reason": "KeyError: 'x'"}]})
    code, said = supervised.run("--max-restarts", 50)
    assert code == 1 and len(supervised.attempts()) == 3
    assert "giving up: the same failure 3 times in a row at step 4: KeyError: 'x'" in said
    assert [row["reason"] for row in supervised.events("give up")] == [
        "the same failure 3 times in a row at step 4: KeyError: 'x'"
    ]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "needs an --output-dir"),
        (["--drop-after", "1"], "--drop-after means something only with --max-restarts"),
        (["--output-dir", "{}/run", "--min-hosts", "2"], "--min-hosts 2: the command has 0 host(s)"),
        (["--output-dir", "{}/run", "--hostfile", "{}/hostfiel"], "no such file (did you mean 'hostfile'?)"),
        (["--output-dir", "{}/run", "--hostfile", "{}/hostfile", "--include", "a:0"], "--max-restarts and --include"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(supervised: Supervised, words: list[str], reason: str) -> None:
    (supervised.directory / "hostfile").write_text("a slots=1\nb slots=1\n")
    words = [word.format(supervised.directory) for word in words]
    own = words if "--drop-after" in words else ["--max-restarts", "1", *(words[2:] if "--min-hosts" in words else [])]
    options = words[2:] if "--hostfile" in words else []
    command = [sys.executable, "-c", RUN, *own, "--", str(supervised.launcher), *options, "t.py", *words[:2]]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and reason in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


def test_a_signal_during_an_attempt_stops_the_run(supervised: Supervised) -> None:
    supervised.plan({"waits": True, "code": 1})
    with supervised.started("--max-restarts", 5) as it:
        wait_for((supervised.output / "ready").exists)
        it.send_signal(signal.SIGTERM)
        said = it.communicate(timeout=30)[1]
    assert it.returncode == 75, said
    assert len(supervised.attempts()) == 1 and not supervised.events("restart", "give up")
    assert "SIGTERM: passed to 1 rank(s)" in said


def test_a_signal_between_two_attempts_stops_the_run(supervised: Supervised) -> None:
    supervised.plan({**CRASH, "left": True})
    with supervised.started("--max-restarts", 5, "--backoff", 1000) as it:
        assert "restart in 300 s" in next(line for line in it.stderr if "attempt 1:" in line)
        it.send_signal(signal.SIGUSR1)
        said = it.communicate(timeout=30)[1]
    assert it.returncode == 75 and len(supervised.attempts()) == 1, said
    assert "stopped by a signal between two attempts" in said
    assert not alive(supervised.attempts()[0]["left"])


def test_a_rank_that_was_stopped_by_others_decides_by_the_signal(supervised: Supervised) -> None:
    saved = {"outcome": {"state": "preempted", "exit_code": 75, "step": 8}, "code": 1}
    (supervised.output / "events.jsonl").write_text('{"kind": "preempt", "reason": "SIGUSR1"}\n')  # of an earlier start
    asked = {**saved, "events": [{"kind": "preempt", "reason": "SIGUSR1"}]}
    supervised.plan(saved, asked, FINISHED)
    code, said = supervised.run("--max-restarts", 5)
    assert code == 75 and len(supervised.attempts()) == 2, said
    assert [row["reason"] for row in supervised.events("restart")] == ["preempted (the launcher is gone)"]


def test_when_the_supervisor_is_killed_nothing_is_left(supervised: Supervised) -> None:
    supervised.plan({"waits": True})
    with supervised.started("--max-restarts", 5) as it:
        wait_for((supervised.output / "ready").exists)
        wait_for(lambda: bool(supervised.attempts()))
        rank = json.loads((supervised.output / "ready").read_text())["rank"]
        launcher = supervised.attempts()[0]["pid"]
        it.kill()
        wait_for(lambda: not alive(launcher), 30)
        os.kill(rank, signal.SIGTERM)  # a trainer sees for itself that its launcher has gone
    assert len(supervised.attempts()) == 1


def test_a_command_that_outstays_a_failed_run_is_ended(supervised: Supervised) -> None:
    supervised.plan({"outcome": {"state": "failed", "exit_code": 1, "step": 4}, "waits": True}, FINISHED)
    code, said = supervised.run("--max-restarts", 5)
    assert code == 0, said
    assert "the run has failed, and the command has not ended within 1 s; ending it" in said


# ---- two hosts ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    with two_hosts(tmp_path_factory.mktemp("hosts")) as both:
        yield both


def pids_on(host: Any, word: str) -> list[int]:
    return [pid for pid, line in host.processes().items() if word in line]


def supervise_on_alpha(hosts: Hosts, it: Supervised, *options: object) -> subprocess.Popen[str]:
    hostfile = hosts.hostfile(alpha=1, beta=1)
    words = it.words("--max-restarts", 5, *options, launcher=("--hostfile", hostfile))
    return hosts.start_on(hosts.alpha, *words)


def test_a_host_that_fails_twice_is_dropped_and_cleared_of_this_run_alone(hosts: Hosts, supervised: Supervised) -> None:
    lost = {"what": "lost", "step": 5, "ranks": [1], "hosts": ["beta"], "message": "beta is gone", "reports": "x"}
    failed = {"outcome": {**CRASH["outcome"], "incident": lost}, "code": 1}
    other = [sys.executable, "-c", "import signal; signal.pause() # other"]
    theirs = hosts.start_on(hosts.beta, *other, RANK="0", PYTHON_VITDS_RUN="another")
    (supervised.output / "config.json").write_text(
        json.dumps({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4})
    )
    supervised.plan({**failed, "remote": "beta"}, failed, FINISHED)
    try:
        with supervise_on_alpha(hosts, supervised) as it:
            said = it.communicate(timeout=100)[0]
        assert it.returncode == 0, said
        first, second, third = supervised.attempts()
        assert first["left"] and not pids_on(hosts.beta, "SIG_IGN"), said
        assert pids_on(hosts.beta, "other"), "it is not ours"
    finally:
        theirs.kill()
    assert "beta: ended 1 process(es) left there, 1 of them killed" in said
    assert second["argv"] == first["argv"]
    assert (supervised.output / "hostfile.attempt-3").read_text().splitlines()[1:] == ["alpha slots=1"]
    hostfile = ["--hostfile", str(supervised.output / "hostfile.attempt-3")]
    assert third["argv"][1:] == [*hostfile, *second["argv"][3:]], "alpha is here: no need for ssh"
    rows = supervised.events("restart", "drop host")
    assert [(row["kind"], row["hosts"]) for row in rows] == [
        ("restart", ["alpha", "beta"]),
        ("drop host", ["beta"]),
        ("restart", ["alpha"]),
    ]
    assert {row["reason"] for row in rows} == {"lost: beta is gone"} and rows[0]["step"] == 5
    assert "failures by host: beta (2)" in said


def test_too_few_hosts_are_given_up(hosts: Hosts, supervised: Supervised) -> None:
    lost = {"what": "lost", "step": 5, "ranks": [0], "hosts": ["alpha"], "message": "alpha is gone", "reports": "x"}
    supervised.plan({"outcome": {**CRASH["outcome"], "incident": lost}, "code": 1})
    with supervise_on_alpha(hosts, supervised, "--drop-after", 1, "--min-hosts", 2) as it:
        said = it.communicate(timeout=100)[0]
    assert it.returncode == 1 and len(supervised.attempts()) == 1, said
    assert "giving up: 1 of 2 host(s) left, --min-hosts is 2" in said


@pytest.mark.launch
def test_a_signal_reaches_ranks_on_other_hosts_under_deepspeed(hosts: Hosts, tmp_path: Path) -> None:
    trainer = tmp_path / "train.py"
    trainer.write_text(TRAINER)
    deepspeed = ["deepspeed", "--force_multi", "--hostfile", str(hosts.hostfile(beta=1)), str(trainer)]
    words = [sys.executable, "-c", RUN, "--", *deepspeed, "--output-dir", str(tmp_path)]
    with hosts.start_on(hosts.alpha, *words, output=tmp_path / "said") as it:
        wait_for(lambda: (tmp_path / "ready-0").exists() or it.poll() is not None)
        os.kill(pids_on(hosts.alpha, "supervisor.run")[0], signal.SIGUSR1)
        it.wait(100)
    said = (tmp_path / "said").read_text()
    assert it.returncode == 75, said
    assert "SIGUSR1: passed to 1 rank(s) on beta" in said and "not passed" not in said
    assert json.loads((tmp_path / "saved-0").read_text()) == "SIGUSR1", said
    assert not pids_on(hosts.beta, "train.py")


def test_a_dead_host_is_left_out_of_the_next_attempt(hosts: Hosts, supervised: Supervised) -> None:
    """The last test of the two hosts: beta stays down."""
    # The link ends with beta, which a network card would not: alpha keeps its address.
    hosts.alpha.run("ip", "address", "add", f"{hosts.alpha.address}/32", "dev", "lo")
    supervised.plan({"waits": True, "outcome": {"state": "failed", "exit_code": 1, "step": 4}}, FINISHED)
    with supervise_on_alpha(hosts, supervised) as it:
        wait_for((supervised.output / "ready").exists)
        hosts.beta.kill()
        said = it.communicate(timeout=100)[0]
    assert it.returncode == 0, said
    assert "beta: failure 1 of 2: " in said and "; left out of attempt 2" in said
    assert (supervised.output / "hostfile.attempt-2").read_text().splitlines()[1:] == ["alpha slots=1"]
    again = Supervised(supervised.directory / "again")
    again.plan(FINISHED)
    with supervise_on_alpha(hosts, again) as it:
        said = it.communicate(timeout=100)[0]
    assert it.returncode == 2 and "beta does not answer: " in said and "say --min-hosts N" in said
    with supervise_on_alpha(hosts, again, "--min-hosts", 1) as it:
        assert it.communicate(timeout=100)[0] and it.returncode == 0
    assert (again.output / "hostfile.attempt-1").read_text().splitlines()[1:] == ["alpha slots=1"]
