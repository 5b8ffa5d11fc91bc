"""`vitds doctor`, and what a training checks at its start, on two real hosts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, two_hosts, why_not
from tests.launching import ROOT
from tests.test_launch import DIGITS

pytestmark = [pytest.mark.launch, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]
RESIDENT = """
import argparse, contextlib, io, json, os, sys, time
from vitds.cluster.doctor import verb as doctor
from vitds.config import load_run_file
from vitds.errors import UserError
parser = argparse.ArgumentParser()
doctor.add_verb(parser.add_subparsers())
def load(path, overrides, world_size):
    return load_run_file(path, overrides, world_size=world_size)
for line in sys.stdin:
    printed, started = io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(printed):
        try:
            code = doctor.run(parser.parse_args(["doctor", *json.loads(line)]), load)
        except UserError as error:
            code = 2
            print(error)
    print(json.dumps([code, printed.getvalue(), time.monotonic() - started]), flush=True)
"""
SECONDS_FILE = os.environ.get("VITDS_DOCTOR_SECONDS")
"""Where each run's arguments and seconds are written, if anywhere."""


class Doctor:
    """`vitds doctor`, as often as it is called, in one process on alpha: its imports take longer than it does."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts, self.directory = hosts, hosts.directory
        self.config, self.output = self.directory / "digits.json", self.directory / "run"
        shutil.copy(DIGITS, self.config)
        self.output.mkdir()
        (self.directory / "lib").mkdir()
        shutil.copytree(ROOT / "vitds", self.directory / "lib" / "vitds", ignore=shutil.ignore_patterns("__pycache__"))
        self.started = subprocess.Popen(
            hosts.alpha.command("env", "-C", str(self.directory), sys.executable, "-c", RESIDENT),
            env=hosts.environment({}), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __call__(self, *arguments: str, hostfile: Path | None = None, **variables: str) -> tuple[int, str, float]:
        """(exit code, what was printed, seconds)."""
        self.hosts.environment(variables)  # writes .deepspeed_env
        hostfile = hostfile or self.hosts.hostfile(alpha=1, beta=1)
        words = ["--hostfile", str(hostfile), "--config", str(self.config), "--output-dir", str(self.output)]
        assert self.started.stdin and self.started.stdout
        self.started.stdin.write(json.dumps([*words, *arguments]) + "\n")
        self.started.stdin.flush()
        code, printed, seconds = json.loads(self.started.stdout.readline())
        if SECONDS_FILE:
            with open(SECONDS_FILE, "a") as file:
                file.write(f"{os.environ['PYTEST_CURRENT_TEST']}: {seconds:.1f} s {arguments}\n{printed}\n")
        return code, printed, seconds

    @contextmanager
    def mounted(self, *mount: str) -> Iterator[None]:
        """Something mounted on beta alone; the last word is where."""
        self.hosts.beta.run("mount", *mount)
        try:
            yield
        finally:
            self.hosts.beta.run("umount", mount[-1])


@pytest.fixture(scope="module")
def doctor(tmp_path_factory) -> Iterator[Doctor]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        found = Doctor(hosts)
        yield found
        assert found.started.stdin
        found.started.stdin.close()
        found.started.wait(30)


def left(doctor: Doctor) -> list[str]:
    """What the doctor started and did not end, on either host."""
    own = "-c " + RESIDENT.split("\n")[1]
    return [
        words for host in doctor.hosts.all for words in host.processes().values() if own not in words.replace("\n", "")
    ]


def test_two_healthy_hosts(doctor):
    code, printed, _ = doctor("--json")
    found = json.loads(printed)
    assert code == 0, printed
    assert found["healthy"]
    by_check = {line["check"]: line for line in found["lines"]}
    assert by_check["interface"]["answer"] == "eth0"
    assert {"latency", "bandwidth", "all-reduce", "output", "torch", "ssh"} <= set(by_check)
    assert all(len(line["hosts"]) == 2 for line in found["lines"] if line["check"] != "port")
    ((i, j, trip, speed),) = [pair for host in found["links"] for pair in host["pairs"]]
    assert (i, j) == (0, 1)
    assert 0 < trip < 0.1
    assert speed > 1e6
    assert not list(doctor.directory.rglob(".vitds-doctor*"))
    assert not left(doctor)


def test_a_slow_link_is_named(doctor):
    doctor.hosts.beta.run("tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "200mbit", "burst", "1mbit", "latency", "400ms")  # fmt: skip
    try:
        code, printed, _ = doctor()
    finally:
        doctor.hosts.beta.run("tc", "qdisc", "del", "dev", "eth0", "root")
    assert code == 1
    assert "alpha and beta: TCP carries" in printed
    assert "not ready: bandwidth (alpha,beta)" in printed


def test_another_config_and_another_vitds(doctor):
    other = doctor.directory / "other"
    shutil.copytree(doctor.directory / "lib", other)
    (other / "vitds" / "errors.py").write_text((other / "vitds" / "errors.py").read_text() + "\n")
    (doctor.directory / "other.json").write_text(doctor.config.read_text() + "\n")
    with doctor.mounted("--bind", str(other), str(doctor.directory / "lib")):
        with doctor.mounted("--bind", str(doctor.directory / "other.json"), str(doctor.config)):
            code, printed, _ = doctor("--no-links", PYTHONPATH=str(doctor.directory / "lib"))
    assert code == 1
    lib = doctor.directory / "lib" / "vitds"
    assert f"fix: rsync -a --delete {lib}/ beta:{lib}/" in printed
    assert f"fix: scp {doctor.config} beta:{doctor.config}" in printed
    assert "not ready: vitds, config (beta)" in printed


def test_an_output_directory_that_is_not_shared(doctor):
    with doctor.mounted("-t", "tmpfs", "tmpfs", str(doctor.output)):
        code, printed, _ = doctor("--no-links")
        assert not doctor.hosts.beta.run("ls", "-A", str(doctor.output))
    assert code == 1
    assert f"beta: --output-dir: {doctor.output} is not what it is on alpha" in printed
    assert not list(doctor.output.iterdir())


def test_a_stale_lock_is_named_and_removed(doctor):
    lock = doctor.directory / "extensions" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    for path in (lock, lock.parent):
        os.utime(path, (1e9, 1e9))
    code, printed, _ = doctor("--no-links", TORCH_EXTENSIONS_DIR=str(lock.parent.parent))
    assert code == 1
    assert f"{lock} belongs to no living process" in printed
    code, printed, _ = doctor("--no-links", "--fix", TORCH_EXTENSIONS_DIR=str(lock.parent.parent))
    assert (code, lock.exists()) == (0, False), printed
    assert "cpu_adam: removed" in printed


def test_names_that_lead_nowhere_or_to_one_machine(doctor):
    hostfile = doctor.directory / "hostfile-names"
    hostfile.write_text("alpha slots=1\nlocalhost slots=1\ngamma slots=1\n")
    code, printed, _ = doctor(hostfile=hostfile)
    assert code == 1
    assert "gamma: ssh: Could not resolve hostname gamma" in printed
    assert "fix: getent hosts gamma" in printed
    assert "alpha,localhost are one machine (alpha)" in printed


def test_a_mistyped_hostfile_and_too_many_ranks(doctor):
    doctor.hosts.hostfile(alpha=1, beta=1)
    code, printed, _ = doctor(hostfile=doctor.directory / "hostfile-alpha1-bets1")
    assert code == 2
    assert "did you mean 'hostfile-alpha1-beta1'?" in printed
    code, printed, _ = doctor("--set", "vitds.cluster.max_gpus=1")
    assert code == 2
    assert "max_gpus" in printed
    code, printed, _ = doctor("--set", "train_batch_size=7")
    assert code == 2
    assert "train_batch_size: 7 does not divide over 2 ranks" in printed


START = """
import json, os, resource, sys, time
from pathlib import Path
import torch.distributed as group
from vitds.cluster.preflight import preflight
from vitds.errors import UserError
rank, there = int(os.environ["RANK"]), Path(sys.argv[1])
group.init_process_group("gloo")
images = Path("/dev/shm/images")  # each host's own
(images / "class").mkdir(parents=True)
(images / ("image" * rank or "other")).write_text("x" * rank)
def unlike():
    errors = Path(sys.modules["vitds.errors"].__file__)
    errors.write_text(errors.read_text() + rank * " ")
def few():
    resource.setrlimit(resource.RLIMIT_NOFILE, (250 if rank else 1000, 1000))
def reading(path):
    return {"a": {"b": 1}, "c": [1, 2], "vitds": {"data": {"train": {"path": str(path)}}}}
same = reading(there / "run")
cases = {
    "same": (lambda: None, there / "run", same),
    "again": (lambda: None, there / "run", same),
    "run file": (lambda: None, there / "run", {"a": {"b": 1 + rank}, "c": [1, 2 + rank]}),
    "output": (lambda: None, there / "unshared", same),
    "data": (lambda: None, there / "run", reading(images)),
    "images": (lambda: None, there / "run", same),
    "files": (few, there / "run", same),
    "vitds": (unlike, there / "run", same),
}
for name, (prepare, output, resolved) in cases.items():
    prepare()
    group.barrier()
    started, said = time.monotonic(), None
    try:
        preflight(output, resolved, {"train": {"images": 9 + rank * (name == "images"), "digest": "ab"}})
    except UserError as error:
        said = str(error)
    print("said " + json.dumps([name, said, time.monotonic() - started]), flush=True)
os._exit(0)
"""


def test_a_start_says_which_host_differs_in_what(doctor):
    hosts, library = doctor.hosts, doctor.directory / "library-of-beta"
    shutil.copytree(doctor.directory / "lib", library)
    ranks, unshared = [], doctor.directory / "unshared"
    unshared.mkdir()
    hosts.beta.run("mount", "-t", "tmpfs", "tmpfs", str(unshared))
    for rank, host in enumerate(hosts.all):
        variables = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": hosts.alpha.address, "MASTER_PORT": "29511"}  # fmt: skip
        path = str(library) if rank else str(doctor.directory / "lib")
        words = ["env", "-C", str(doctor.directory), f"PYTHONPATH={path}", sys.executable, "-c", START]
        ranks.append(hosts.start_on(host, *words, str(doctor.directory), **variables))
    printed = [rank.communicate(timeout=120)[0] for rank in ranks]
    said = [[json.loads(line[5:]) for line in text.splitlines() if line.startswith("said ")] for text in printed]
    messages = {name: message for name, message, _ in said[0]}
    assert messages == {name: message for name, message, _ in said[1]}, printed
    assert len(messages) == 8, printed
    assert messages["same"] is None
    assert messages["again"] is None
    assert max(seconds for name, _, seconds in said[0] if name != "output") < 4
    assert "beta: the run file differs: a.b is 2, 1 on alpha; c[1] is 3, 2 on alpha" in messages["run file"]
    assert f"beta: --output-dir {unshared} is not what it is on alpha" in messages["output"]
    assert "vitds.data.train.path: 2 entries" in messages["data"] and "on beta" in messages["data"]
    assert "rank 1 on beta: vitds.data.train holds 10 images, 9 images on alpha" in messages["images"]
    assert "beta: 250 open files are allowed; 2 ranks need 264" in messages["files"]
    assert f"(in {library / 'vitds'}) on beta" in messages["vitds"] and "rsync" in messages["vitds"]
    assert not [*doctor.output.iterdir(), *unshared.iterdir()]


def test_a_frozen_host_is_named_in_time(doctor):
    doctor.hosts.beta.freeze()
    try:
        code, printed, seconds = doctor("--timeout", "4", "--no-links")
    finally:
        doctor.hosts.beta.thaw()
    assert code == 1
    assert seconds < 10
    assert "ping -c 3 beta" in printed
    assert "not ready: ssh (beta)" in printed
    end = time.monotonic() + 20
    while left(doctor):
        assert time.monotonic() < end, left(doctor)
        time.sleep(0.1)


def test_a_host_that_cannot_be_reached(doctor):
    doctor.hosts.switch.cut(doctor.hosts.beta)
    try:
        code, printed, seconds = doctor("--timeout", "4")
    finally:
        doctor.hosts.switch.mend(doctor.hosts.beta)
    assert (code, seconds < 10) == (1, True), printed
    assert "not ready: ssh (beta)" in printed
    doctor.hosts.beta.kill()  # the last test
    code, printed, seconds = doctor("--timeout", "4")
    assert (code, seconds < 10) == (1, True), printed
    assert "not ready: ssh (beta)" in printed
