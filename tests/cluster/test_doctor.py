"""`vitds doctor`: what it makes of the facts. On two real hosts: test_doctor_hosts.py."""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.launching import free_port
from vitds.cluster.doctor import probe
from vitds.cluster.doctor import verb as doctor
from vitds.cluster.doctor.checks import check
from vitds.cluster.doctor.comparing import Job
from vitds.cluster.doctor.links import rounds
from vitds.cluster.doctor.network import Measured, link_lines, missing_interfaces
from vitds.cluster.doctor.sessions import ask, deepspeed_environment
from vitds.cluster.doctor.table import WARNING, WRONG, Line, ranges, remarks, table, verdict
from vitds.cluster.hostfile import Host
from vitds.cluster.preflight import early_checks
from vitds.errors import UserError
from vitds.interruption import command_line

GIB = 1 << 30


def one(i: int, name: str, count: int) -> dict:
    """The facts of a healthy host among `count`, its names n001 …"""
    others = [f"n{j:03}" for j in range(1, count + 1) if f"n{j:03}" != name][:4]
    return {
        "hostname": name, "machine": f"boot-{i} net", "python": ["3.11.9", "/env/bin/python"],
        "packages": {"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.17.0", "safetensors": "0.8.0", "numpy": "2.4.6", "vitds": None},
        "sources": {"from": "/env/vitds", "digest": "aaaa"}, "config": "cccc", "accelerators": {"kind": "cuda", "count": 8},
        "clock": (-0.3, 0.2), "port": None, "addresses": ["10.0.0.1"], "interfaces": {"lo": ["127.0.0.1"], "eth0": [f"10.0.0.{i}"]},
        "own_address": f"10.0.0.{i}", "routes": {peer: ["10.0.0.1" if peer == "n001" else "10.0.0.9", f"10.0.0.{i}"] for peer in others},
        "environ": {}, "limits": {"nofile": 65536, "memlock": -1, "infiniband": True}, "locks": [],
        "shm": {"size": 64 * GIB, "free": 60 * GIB, "leftovers": [], "left": 0}, "data": {"vitds.data.train.path": {"digest": "dddd", "entries": 1000}},
        "output": {"directory": "/runs", "path": f"/runs/{name}"}, "seen": [f"/runs/n{j:03}" for j in range(1, count + 1)],
    }  # fmt: skip


def cluster(count: int) -> tuple[Job, dict[str, dict]]:
    names = [f"n{i:03}" for i in range(1, count + 1)]
    job = Job(tuple(Host(name, 8) for name in names), 29500, "run.json", "/runs/a", "/work")
    return job, {name: one(i, name, count) for i, name in enumerate(names, 1)}


def changed(facts: dict, host: str, **values) -> None:
    facts[host] = {**facts[host], **values}


def troubles(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line.state in (WRONG, WARNING)]


def test_ranges():
    assert ranges(["n001", "n002", "n003", "n007", "login"]) == "n[001-003,007],login"
    assert ranges(["gpu-9", "gpu-10", "gpu-11"]) == "gpu-[9-11]"
    assert ranges(["a1", "b", "10.0.0.7"]) == "a1,b,10.0.0.7"


def test_the_table_of_two_healthy_hosts():
    job, facts = cluster(2)
    lines = check(job, facts)
    names = list(facts)
    assert (
        table(lines, names)
        == """\
    check                  answer              hosts
ok  python                 3.11.9              all 2
ok  torch                  2.13.0              all 2
ok  deepspeed              0.19.8              all 2
ok  transformers           5.17.0              all 2
ok  safetensors            0.8.0               all 2
ok  numpy                  2.4.6               all 2
ok  vitds                  sources aaaa        all 2
ok  config                 cccc                all 2
ok  accelerators           8, slots=8          all 2
ok  clock                  within 1 s          all 2
ok  port                   29500 is free       n001
ok  interface              eth0                all 2
ok  output                 /runs is shared     all 2
ok  vitds.data.train.path  1000 entries, dddd  all 2
ok  limits                 65536 open files    all 2
ok  /dev/shm               has room            all 2
ok  JIT locks              none                all 2"""
    )
    assert remarks(lines) == ""
    assert verdict(lines, names, 16) == "verdict: 2 hosts, 16 ranks: healthy"


def test_the_table_of_128_hosts_stays_short():
    job, facts = cluster(128)
    changed(facts, "n042", packages={**facts["n042"]["packages"], "torch": "2.12.1"})
    changed(facts, "n100", accelerators={"kind": "cuda", "count": 7})
    changed(facts, "n003", clock=(39.9, 40.4))
    changed(facts, "n004", clock=(39.9, 40.3))
    changed(facts, "n128", seen=["/runs/n128"])
    lines = check(job, facts)
    names = list(facts)
    assert (
        table(lines, names)
        == """\
       check                  answer              hosts
ok     python                 3.11.9              all 128
ok     torch                  2.13.0              n[001-041,043-128]
WRONG                         2.12.1              n042
ok     deepspeed              0.19.8              all 128
ok     transformers           5.17.0              all 128
ok     safetensors            0.8.0               all 128
ok     numpy                  2.4.6               all 128
ok     vitds                  sources aaaa        all 128
ok     config                 cccc                all 128
ok     accelerators           8, slots=8          n[001-099,101-128]
WRONG                         7, slots=8          n100
ok     clock                  within 1 s          n[001-002,005-128]
WRONG                         +39.9 s             n[003-004]
ok     port                   29500 is free       n001
ok     interface              eth0                all 128
ok     output                 /runs is shared     n[001-127]
WRONG                         /runs is another    n128
ok     vitds.data.train.path  1000 entries, dddd  all 128
ok     limits                 65536 open files    all 128
ok     /dev/shm               has room            all 128
ok     JIT locks              none                all 128"""
    )
    assert remarks(lines).splitlines()[:4] == [
        "torch 2.12.1 on n042, 2.13.0 on n001",
        "    fix: ssh n042 '/env/bin/python -m pip install torch==2.13.0'",
        "n100: slots=8 in the hostfile, but there are 7 accelerators",
        "    fix: write slots=7 in the hostfile",
    ]
    assert (
        verdict(lines, names, 1024)
        == "verdict: 128 hosts, 1024 ranks: not ready: torch, accelerators, clock, output (n[003-004,042,100,128])"
    )


FAULTS = {
    "no vitds": ({"sources": None}, WRONG, "vitds is missing on n002", "rsync -a --delete /env/vitds/ n002:/env/vitds/"),
    "other vitds": ({"sources": {"from": "/env/vitds", "digest": "bbbb"}}, WRONG, "vitds is sources bbbb (in /env/vitds) on n002", "rsync"),
    "other Python": ({"python": ["3.12.1", "/env/bin/python"]}, WRONG, "Python 3.12.1 on n002", "ssh n002 'cd /work && make setup PYTHON=python3.11'"),
    "config unreadable": ({"config": "run.json: No such file or directory"}, WRONG, "No such file", "scp /work/run.json n002:/work/run.json"),
    "no accelerators": ({"accelerators": {"kind": "cuda", "error": "driver"}}, WRONG, "cannot be counted: driver", "ssh n002 'nvidia-smi -L'"),
    "idle accelerators": ({"accelerators": {"kind": "cuda", "count": 9}}, WARNING, "leaves 1 of 9 accelerators idle", "slots=9"),
    "few cores": ({"accelerators": {"kind": "cpu", "count": 4}}, WARNING, "slots=8 in the hostfile, for 4 CPU cores", "slots=4"),
    "slow clock": ({"clock": (-9.0, -8.0)}, WARNING, "the clock is -8.0 s off", "ssh n002 'sudo chronyc makestep"),
    "one machine": ({"hostname": "n001", "machine": "boot-1 net"}, WRONG, "n[001-002] are one machine (n001)", "hostfile"),
    "own name is loopback": ({"own_address": "127.0.1.1"}, WRONG, "its own name stands for 127.0.1.1", "echo GLOO_SOCKET_IFNAME=eth0 >> .deepspeed_env"),
    "interface is not there": ({"environ": {"GLOO_SOCKET_IFNAME": "ib0"}}, WRONG, "there is no ib0; there are lo, eth0", "GLOO_SOCKET_IFNAME=eth0"),
    "another interface": ({"environ": {"GLOO_SOCKET_IFNAME": "lo"}}, WARNING, "gloo uses lo, but the way to the other hosts is eth0", "GLOO_SOCKET_IFNAME=eth0"),
    "unknown peer": ({"routes": {"n001": []}}, WARNING, "n002: the name n001 cannot be resolved", "ssh n002 'getent hosts n001'"),
    "output is read-only": ({"output": {"directory": "/runs", "error": "Read-only file system"}}, WRONG, "/runs cannot be written: Read-only", "findmnt -T /runs"),
    "output is another": ({"seen": ["/runs/n002"]}, WRONG, "n002: --output-dir: /runs is not what it is on n001", "findmnt -T /runs"),
    "no data": ({"data": {"vitds.data.train.path": {"error": "/data: No such file or directory"}}}, WRONG, "n002: vitds.data.train.path: /data: No such", "ls -ld /data"),
    "other data": ({"data": {"vitds.data.train.path": {"digest": "eeee", "entries": 999}}}, WRONG, "999 entries, eeee on n002", "copy"),
    "few files": ({"limits": {"nofile": 300, "memlock": -1, "infiniband": False}}, WRONG, "300 open files are allowed; 16 ranks need 320", "limits.d"),
    "little locked memory": ({"limits": {"nofile": 9999, "memlock": 65536, "infiniband": True}}, WARNING, "InfiniBand wants no limit", "memlock unlimited"),
    "small shared memory": ({"shm": {"size": GIB // 16, "free": GIB // 16, "leftovers": [], "left": 0}}, WARNING, "64 of 64 MiB free in /dev/shm", "--shm-size"),
    "left over": ({"shm": {"size": GIB, "free": GIB, "leftovers": ["/dev/shm/a b"], "left": GIB // 2}}, WARNING, "hold 512 MiB", "'/dev/shm/a b'"),
    "stale lock": ({"locks": [{"path": "/x/op/lock", "idle": 9e3, "holder": None}]}, WRONG, "/x/op/lock belongs to no living process", "ssh n002 'rm /x/op/lock', or vitds doctor --fix"),
    "fresh lock": ({"locks": [{"path": "/x/op/lock", "idle": 9.0, "holder": None}]}, WARNING, "/x/op/lock, 9 s old", "rm"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_names_the_host_and_the_fix(fault):
    change, state, message, fix = FAULTS[fault]
    job, facts = cluster(2)
    changed(facts, "n002", **change)
    (line,) = troubles(check(job, facts))
    assert line.state == state
    assert message in line.message
    assert fix.replace("'", "") in line.fix.replace("'\"'\"'", "").replace("'", "")
    assert "n002" in line.hosts


def test_a_lock_that_another_host_holds_is_not_stale():
    job, facts = cluster(2)
    changed(facts, "n001", locks=[{"path": "/x/op/lock", "idle": 9e3, "holder": 7}])
    changed(facts, "n002", locks=[{"path": "/x/op/lock", "idle": 9e3, "holder": None}])
    assert not troubles(check(job, facts))


def test_a_port_that_is_taken_is_the_first_hosts_affair():
    job, facts = cluster(2)
    changed(facts, "n001", port="Address already in use")
    (line,) = troubles(check(job, facts))
    assert line.hosts == ("n001",) and "--master_port 29501" in line.fix


@pytest.mark.parametrize("count", [2, 3, 8, 9])
def test_a_tournament_lets_everyone_meet_everyone_once(count):
    met = [pair for matches in rounds(count) for pair in matches]
    assert sorted(met) == [(i, j) for i in range(count) for j in range(i + 1, count)]
    for matches in rounds(count):
        assert len({i for pair in matches for i in pair}) == 2 * len(matches)


def measured(count: int, slow: dict[tuple[int, int], float]) -> dict[str, Measured]:
    done = {i: {"index": i, "pairs": [], "own": 2e11, "all": 1e11} for i in range(count)}
    for matches in rounds(count):
        for i, j in matches:
            done[i]["pairs"].append([i, j, 1e-4 * slow.get((i, j), 1), 1e10])
    return {f"n{i + 1:03}": Measured("done", done=row) for i, row in done.items()}


def test_outliers_are_named_as_hosts_or_as_pairs():
    job, _ = cluster(8)
    assert not troubles(list(link_lines(job, measured(8, {}), "n001", 60)))
    host = {(min(i, 4), max(i, 4)): 20.0 for i in range(8) if i != 4}
    (line,) = troubles(list(link_lines(job, measured(8, host), "n001", 60)))
    assert line.hosts == ("n005",) and "2.00 ms; the bound is 0.50 ms" in line.message
    (line,) = troubles(list(link_lines(job, measured(8, {(2, 6): 20.0}), "n001", 60)))
    assert line.hosts == ("n003", "n007")
    found = measured(8, {})
    found["n006"].done["own"] = 2e10
    (line,) = troubles(list(link_lines(job, found, "n001", 60)))
    assert line.hosts == ("n006",) and "20 GB/s, elsewhere 200 GB/s" in line.message


@pytest.mark.parametrize(
    ("stages", "hosts", "words"),
    [
        ({"n001": "group", "n002": "connect"}, ("n002",), "n002 cannot reach n001 at 10.0.0.1 port 29500"),
        ({"n001": "connect", "n002": "connect"}, ("n001",), "n001 cannot listen on port 29500"),
        ({"n001": "group", "n002": "group"}, ("n001", "n002"), "cannot open connections to each other"),
        ({"n001": "pair", "n002": "pair"}, ("n001", "n002"), "the link between them is dead: not within 60 s"),
        ({"n001": "start", "n002": ""}, ("n002",), "n002: the links cannot be measured"),
    ],
)
def test_where_a_measurement_got_stuck_is_said(stages, hosts, words):
    job, _ = cluster(2)
    (line,) = link_lines(job, {name: Measured(stage) for name, stage in stages.items()}, "10.0.0.1", 60)
    assert line.state == WRONG and line.hosts == hosts and words in line.message


def test_the_environment_is_the_launchers(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".deepspeed_env").write_text("A=home\nB=home\n")
    (tmp_path / ".deepspeed_env").write_text("B='x y; rm'\nNCCL_SOCKET_IFNAME=^docker,lo\nC=\n")
    given = {"NCCL_DEBUG": "INFO", "PYTHONPATH": "/p", "PATH": "/bin", "SECRET": "s"}
    assert deepspeed_environment(given, tmp_path, tmp_path / "home") == {
        "NCCL_DEBUG": "INFO", "PYTHONPATH": f"{tmp_path}:/p", "A": "home", "B": "x y; rm", "C": "",
        "NCCL_SOCKET_IFNAME": "^docker,lo",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A=1\n\nB=2\n", ":2: '' is not NAME=value"),
        ("# notes\n", ":1: '# notes' is not NAME=value"),
        ("A=$(reboot)\n", "write A='$(reboot)'"),
        ("A=1; reboot\n", "as it is"),
        ('A="`reboot`"\n', "as it is"),
        ("A B=1\n", "NAME=value"),
    ],
)
def test_what_a_shell_would_act_on_is_refused(tmp_path, text, words):
    (tmp_path / ".deepspeed_env").write_text(text)
    with pytest.raises(UserError) as raised:
        deepspeed_environment({}, tmp_path, tmp_path / "home")
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("variable", "value", "missing"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", []),
        ("GLOO_SOCKET_IFNAME", "eth", ["eth"]),
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", ["ib0"]),
        ("NCCL_SOCKET_IFNAME", "eth", []),
        ("NCCL_SOCKET_IFNAME", "=eth", ["eth"]),
        ("NCCL_SOCKET_IFNAME", "^lo", []),
        ("NCCL_SOCKET_IFNAME", "ib,bond", ["ib", "bond"]),
    ],
)
def test_interfaces_are_named_in_each_librarys_way(variable, value, missing):
    assert missing_interfaces(variable, value, ["lo", "eth0"]) == missing


def test_a_start_removes_stale_locks_and_no_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    stale, held = (tmp_path / name / "lock" for name in ("one", "two"))
    for lock in (stale, held):
        lock.parent.mkdir()
        lock.touch()
        os.utime(lock, (1e9, 1e9))
        os.utime(lock.parent, (1e9, 1e9))
    with held.open():
        early_checks({})
        assert not stale.exists()
        late = {"path": str(held), "idle": 1e9, "holder": None}  # a builder that has come since somebody looked
        assert not probe.remove_if_stale(late)["removed"]
        assert held.exists()
    gone = {"path": str(stale), "idle": 1e9, "holder": None}  # another host of the same file system was quicker
    assert probe.remove_if_stale(gone)["removed"]
    assert str(stale) in capsys.readouterr().err


def test_a_start_names_an_interface_that_is_not_there():
    ranks = {"WORLD_SIZE": "4", "LOCAL_SIZE": "2", "GLOO_SOCKET_IFNAME": "nosuch0"}
    with pytest.raises(UserError, match=r"has no interface nosuch0; it has .*\blo \(127\.0\.0\.1\)"):
        early_checks(ranks)
    early_checks({**ranks, "LOCAL_SIZE": "4"})
    early_checks({**ranks, "GLOO_SOCKET_IFNAME": "lo"})


def test_leftovers_are_those_that_nobody_maps(tmp_path):
    (tmp_path / f"{probe.LEFTOVERS}dead").write_bytes(b"x" * 8192)
    with open(tmp_path / f"{probe.LEFTOVERS}alive", "w+b") as file:
        file.write(b"x" * 8192)
        file.flush()
        with mmap.mmap(file.fileno(), 8192):
            found = probe.shared_memory(str(tmp_path))
    assert found["leftovers"] == [str(tmp_path / f"{probe.LEFTOVERS}dead")]
    assert found["left"] == 8192


def test_a_script_is_ended_at_its_limit(tmp_path):
    """What a login prints does not disturb; what is left at the limit is killed, with all that it has said."""
    script = f"""
import os, time
def main(request):
    print("Welcome!{probe.MARK}" + '{{"pid": %d, "heard": "%s", "was": "%s"}}' % (os.getpid(), request["word"], os.environ["WORD"]))
    print("{probe.MARK}not JSON", flush=True)
    time.sleep(600)
"""
    (answer,) = ask(script, {"localhost": {"word": "a'b", "limit": 60}}, {"WORD": "c'd $e"}, 1.5, local=True)
    (row,) = answer.rows
    assert (row["heard"], row["was"]) == ("a'b", "c'd $e")
    assert answer.code is None
    assert 1.5 <= answer.seconds < 10
    assert not os.path.exists(f"/proc/{row['pid']}")


def test_a_probe_ends_with_the_session_that_asked(tmp_path):
    program = tmp_path / "probe.py"
    request = {"look": [str(tmp_path / "never")], "patience": 300, "limit": 300}
    program.write_text(f"{Path(probe.__file__).read_text()}\nmain({request!r})\n")
    command = f"{sys.executable} {program} & echo $!; wait"
    session = subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, text=True)
    assert session.stdout
    there = Path("/proc", session.stdout.readline().strip())
    end = time.monotonic() + 120
    while len(list((there / "task").iterdir())) < 2:  # until it watches
        assert time.monotonic() < end
        time.sleep(0.02)
    session.kill()
    session.wait()
    while command_line(int(there.name)) not in ([], [""]):  # gone, or a zombie
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["localhost", "nosuchhost"])
def test_the_only_host_of_a_hostfile_is_this_one(tmp_path, monkeypatch, capsys, name):
    """DeepSpeed does not use ssh for it, and trains here whatever it is called."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\n")
    (tmp_path / "hostfile").write_text(f"{name} slots=1\n")
    (tmp_path / "run.json").write_text("{}")
    parser = argparse.ArgumentParser()
    doctor.add_verb(parser.add_subparsers())
    words = ["doctor", "--hostfile", "hostfile", "--config", "run.json", "--output-dir", "runs/a", "--master-port", "0"]
    with pytest.raises(SystemExit):
        parser.parse_args(words)
    options = parser.parse_args([*words[:-1], str(free_port()), "--json"])
    code = doctor.run(
        options, lambda *_: SimpleNamespace(resolved={"vitds": {"data": {"train": {"path": "run.json"}}}})
    )
    found = json.loads(capsys.readouterr().out)
    assert code == (name != "localhost"), found
    assert ("DeepSpeed starts that one where it runs itself" in found["lines"][0]["message"]) == (name != "localhost")
    assert "vitds.data.train.path" in [line["check"] for line in found["lines"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".deepspeed_env", "hostfile", "run.json"]
