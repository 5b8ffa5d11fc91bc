"""launcher/slurm.sbatch, run with bash: what becomes of a job after each end a run can have. The Kubernetes example parses.

What stands outside is stood in for by small programs on PATH: srun (a process a host, signals as Slurm passes them),
scontrol, scancel, and deepspeed, which leaves the outcome.json of a test's choice. `vitds` is this repository's.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.test_interruption import LIGHT
from vitds.cluster.hostfile import Host, read_hostfile

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "launcher" / "slurm.sbatch"
# The real verbs, without the rest of vitds.cli, which takes seconds to import.
VITDS = f"#!{sys.executable}\n{LIGHT}" + (
    """
import argparse
from vitds.cluster import schedulers
from vitds.cluster.supervise import attempt as run
from vitds.errors import UserError
try:
    if sys.argv[1] == "run":
        sys.exit(run.run(sys.argv[2:]))
    parser = argparse.ArgumentParser()
    schedulers.add_verb(parser.add_subparsers())
    sys.exit(schedulers.run(parser.parse_args(sys.argv[1:])))
except UserError as error:
    print(f"vitds: {error}", file=sys.stderr)
    sys.exit(2)
"""
)
SRUN = """#!/usr/bin/env bash
printf '%s ' "$@" >"$LOG.srun"
while [[ $1 == --* ]]; do
    if [[ $1 == --ntasks=* ]]; then tasks=${1#*=}; fi
    shift
done
for ((i = 0; i < tasks; i++)); do SLURM_NODEID=$i "$@" & pids+=("$!"); done
trap 'kill -USR1 "${pids[@]}"' USR1
trap 'kill -KILL "${pids[@]}"; exit 137' TERM  # as srun does
code=0
for pid in "${pids[@]}"; do
    wait "$pid"; wait "$pid"; ended=$?
    if ((ended > code)); then code=$ended; fi
done
exit "$code"
"""
DEEPSPEED = """#!/usr/bin/env bash
# In each host's place: says how it was called; the first host's waits, where the test wants it, and leaves outcome.json.
{ printf '%s\\n' "$@"; echo "IFNAME=${NCCL_SOCKET_IFNAME:-}"; } >"$LOG.host-$SLURM_NODEID"
if [[ $SLURM_NODEID != 0 ]]; then exit "${EXIT:-0}"; fi
cp -- "$2" "$LOG.hostfile"
leave() { if [[ -n ${OUTCOME:-} ]]; then printf '%s' "$OUTCOME" >"$OUTPUT/outcome.json"; fi; exit "${EXIT:-0}"; }
if [[ -n ${WAIT:-} ]]; then
    trap leave TERM  # from `vitds run`, which finds no ranks here
    : >"$LOG.ready"
    until [[ -e $LOG.told ]]; do sleep 0.1 & wait "$!"; done
fi
leave
"""
LOGGED = """#!/usr/bin/env bash
printf '%s ' "${0##*/}" "$@" >>"$LOG"; echo >>"$LOG"
exit "${SCONTROL:-0}"
"""
SSH = """#!/usr/bin/env bash
# To a host whose ranks take the signal that `vitds run` brings them.
: >"$LOG.told"
echo '{"name": "worker", "here": false, "signalled": 8}'
"""


class Cluster:
    """A directory with the stand-ins, and what they have written down."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.work, self.output, self.log = (folder / name for name in ("bin", "work", "a run", "log"))
        self.srun = folder / "log.srun"
        self.bin.mkdir()
        (self.work / "launcher").mkdir(parents=True)
        (self.work / "launcher" / "train.py").touch()
        self.log.touch()
        for name, text in {
            "vitds": VITDS,
            "srun": SRUN,
            "deepspeed": DEEPSPEED,
            "scontrol": LOGGED,
            "scancel": LOGGED,
            "ssh": SSH,
        }.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)

    def start(self, *words: str, **more: str) -> subprocess.Popen[str]:
        environ = {
            "PATH": f"{self.bin}:{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(self.work), "LOG": str(self.log),
            "OUTPUT": str(self.output), "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "gpu1", "SLURM_GPUS_ON_NODE": "8",
        } | more  # fmt: skip
        words = words or ("--config", "a b.json", "--output-dir", str(self.output))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(["bash", str(SCRIPT), *words], cwd=self.work, env=environ, text=True, **pipes)

    def run(self, *words: str, **more: str) -> tuple[int, str]:
        """Exit code and what the script said."""
        self.log.write_text("")
        with self.start(*words, **more) as job:
            said, _ = job.communicate(timeout=120)
        return job.returncode, said

    def calls(self) -> list[str]:
        """What was asked of Slurm, without srun."""
        return [line.strip() for line in self.log.read_text().splitlines()]

    def started(self) -> bool:
        return self.srun.exists()


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def outcome(state: str, code: int | None, step: int = 120, **more: object) -> str:
    return json.dumps({"state": state, "exit_code": code, "step": step, "time": 1.5, **more})


INCIDENT = {"what": "hang", "step": 130, "ranks": [3], "hosts": ["gpu2"], "message": "rank 3", "reports": ""}
TWO = {"SLURM_JOB_NODELIST": "gpu[1-2]"}
REQUEUE = ["scontrol requeue 4711"]


@pytest.mark.parametrize(
    ("left", "launched", "code", "calls", "said"),
    [
        (outcome("finished", 0), 0, 0, [], "is finished at step 120"),
        (outcome("preempted", 75), 75, 0, REQUEUE, "preempted and saved at step 120; requeueing job 4711"),
        (outcome("failed", 1, incident=INCIDENT), 1, 0, REQUEUE, "(failure 1 of at most 3 at step 120); requeueing"),
        (outcome("failed", 1), 1, 1, [], "the run failed (above); not started again"),
        (outcome("failed", 2, incident=INCIDENT), 1, 2, [], "the run's input is wrong"),
        (outcome("running", None), 137, 0, REQUEUE, "ended without a word (exit code 137) (failure 1"),
        ("", 2, 2, [], "training did not begin (exit code 2, above)"),
        ("", 0, 1, [], "training did not begin (exit code 0, above)"),
        ("[]", 0, 1, [], "training did not begin"),
        ('{"state": "pre', 0, 1, [], "training did not begin"),
    ],
    ids=["finished", "preempted", "incident", "failed", "input", "no-word", "user-error", "nothing", "list", "torn"],
)
def test_every_end_of_a_run(cluster: Cluster, left: str, launched: int, code: int, calls: list[str], said: str):
    cluster.output.mkdir()
    (cluster.output / "outcome.json").write_text(outcome("preempted", 75, step=7))  # of the start before
    found, text = cluster.run(OUTCOME=left, EXIT=str(launched))
    assert (found, cluster.calls()) == (code, calls), text
    assert said in text


def test_what_is_launched(cluster: Cluster):
    (cluster.work / ".deepspeed_env").write_text("NCCL_SOCKET_IFNAME=ib0\n\n# no=comment\nGLOO_SOCKET_IFNAME=ib0")
    words = ["--config", "a b.json", "--set", "x='$(touch oops)\"", f"--output-dir={cluster.output}"]
    code, said = cluster.run(*words, OUTCOME=outcome("finished", 0), SLURM_CPUS_PER_TASK="96", **TWO)
    assert code == 0, said
    hostfile = f"{cluster.output}/hostfile-4711"
    for node in (0, 1):
        called = (cluster.log.parent / f"log.host-{node}").read_text().splitlines()
        assert called == [
            "--hostfile", hostfile, "--no_ssh", "--node_rank", str(node), "--master_addr", "gpu1", "--master_port", "14711",
            "launcher/train.py", *words, "IFNAME=ib0",
        ]  # fmt: skip
    assert read_hostfile(cluster.log.parent / "log.hostfile") == [Host("gpu1", 8), Host("gpu2", 8)]
    assert not Path(hostfile).exists()
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1 --cpu-bind=none --cpus-per-task=96 --kill-on-bad-exit=0" in (
        cluster.srun.read_text()
    )
    assert not (cluster.work / "oops").exists()


def test_failures_in_a_row(cluster: Cluster):
    """Counted as long as no step is gained; another job starts afresh, and so does what cannot be read."""
    starts = itertools.count()

    def fails(step: int, **more: str) -> tuple[int, bool]:
        left = outcome("failed", 1, step=step, incident=INCIDENT, start=next(starts))  # no two alike
        code, _ = cluster.run(OUTCOME=left, EXIT="1", VITDS_MAX_FAILURES="2", **more)
        return code, cluster.calls() != []

    assert [fails(100), fails(100), fails(100)] == [(0, True), (0, True), (1, False)]
    assert [fails(200), fails(200), fails(150)] == [(0, True), (0, True), (1, False)]
    assert [fails(150, SLURM_JOB_ID="4712")] == [(0, True)]
    (cluster.output / "batch-failures").write_text("x[$(touch oops)] 1 9\n")
    assert fails(150) == (0, True)
    assert not (cluster.work / "oops").exists()


@pytest.mark.parametrize(
    ("task", "before", "left", "code", "calls", "starts"),
    [
        ("3", None, outcome("preempted", 75), 0, [], True),
        ("5", None, outcome("preempted", 75), 75, [], True),
        ("3", None, outcome("failed", 1, incident=INCIDENT), 0, [], True),
        ("3", None, outcome("finished", 0), 0, ["scancel --state=PENDING 4700"], True),
        ("3", None, outcome("failed", 2), 2, ["scancel --state=PENDING 4700"], True),
        ("3", outcome("finished", 0), outcome("failed", 1), 0, ["scancel --state=PENDING 4700"], False),
        ("2", outcome("finished", 0), outcome("preempted", 75), 0, [], True),  # the first: total_steps may have grown
        ("3", outcome("preempted", 75, step=7), outcome("preempted", 75), 0, [], True),
    ],
)
def test_a_chain_of_jobs(
    cluster: Cluster, task: str, before: str | None, left: str, code: int, calls: list[str], starts: bool
):
    cluster.output.mkdir()
    if before:
        (cluster.output / "outcome.json").write_text(before)
    array = {"JOB_ID": "4700", "TASK_ID": task, "TASK_MIN": "2", "TASK_MAX": "5"}
    found, said = cluster.run(OUTCOME=left, **{f"SLURM_ARRAY_{name}": value for name, value in array.items()})
    assert (found, cluster.calls(), cluster.started()) == (code, calls, starts), said


@pytest.mark.parametrize(
    ("number", "left", "code", "calls", "said"),
    [
        (signal.SIGUSR1, outcome("preempted", 75), 0, REQUEUE, "saved at step 120; requeueing"),
        (signal.SIGUSR1, "", 0, REQUEUE, "time was up before training began (failure 1"),
        (
            signal.SIGTERM,
            outcome("preempted", 75),
            75,
            [],
            "saved at step 120; told to end by Slurm or scancel, so not requeued",
        ),
    ],
)
def test_signals_reach_the_ranks(
    cluster: Cluster, number: signal.Signals, left: str, code: int, calls: list[str], said: str
):
    """SIGUSR1 ahead of the limit and Slurm's SIGTERM come to the script alone; both save, one of them requeues."""
    ready = Path(f"{cluster.log}.ready")
    with cluster.start(OUTCOME=left, EXIT="75", WAIT="1", **TWO) as job:
        end = time.monotonic() + 120
        while not ready.exists():
            assert time.monotonic() < end and job.poll() is None, job.communicate()
            time.sleep(0.02)
        os.kill(job.pid, number)
        text, _ = job.communicate(timeout=120)
    assert (job.returncode, cluster.calls()) == (code, calls), text
    assert said in text and f"{number.name}: the ranks save and stop" in text
    assert "vitds run: SIGUSR1: no rank on this host" in text  # what srun passed on


def test_a_job_that_cannot_be_requeued_says_so(cluster: Cluster):
    code, said = cluster.run(OUTCOME=outcome("preempted", 75), SCONTROL="1")
    assert (code, cluster.calls()) == (75, REQUEUE)
    assert "it could not be requeued; submit it again" in said


@pytest.mark.parametrize(
    ("words", "more", "said"),
    [
        (("--config", "a.json"), {}, "--output-dir DIRECTORY"),
        ((), {"SLURM_GPUS_ON_NODE": ""}, "slurm does not say how many processes a host takes; give --slots"),
        ((), {"SLURM_JOB_NODELIST": "gpu[1-2];reboot"}, "is not a host name"),
    ],
)
def test_nothing_starts_on_bad_input(cluster: Cluster, words: tuple[str, ...], more: dict[str, str], said: str):
    code, text = cluster.run(*words, **more)
    assert code == 2 and said in text and not cluster.started() and cluster.calls() == []


def test_the_headers():
    """What requeueing needs of sbatch: the signal to the script alone, minutes ahead, and one log for all starts."""
    headers = [
        line.split(maxsplit=1)[1].strip() for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH ")
    ]
    assert {"--signal=B:USR1@300", "--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= set(headers)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    found = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_the_mpijob():
    job = yaml.safe_load((ROOT / "launcher" / "mpijob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    worker, launcher = (job["spec"]["mpiReplicaSpecs"][role] for role in ("Worker", "Launcher"))
    container = worker["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == job["spec"]["slotsPerWorker"]
    start = launcher["template"]["spec"]["containers"][0]
    assert (ROOT / {e["name"]: e["value"] for e in start["env"]}["CONFIG"]).is_file()
    for one in (container, start):
        volumes = {
            volume["name"] for volume in (worker if one is container else launcher)["template"]["spec"]["volumes"]
        }
        assert {mount["name"] for mount in one["volumeMounts"]} == volumes


def test_the_mpijob_hands_on_its_end(cluster: Cluster):
    """Kubernetes signals process 1 alone, which is the example's bash."""
    job = yaml.safe_load((ROOT / "launcher" / "mpijob.yaml").read_text())
    start = job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]
    cluster.output.mkdir()
    hosts = cluster.output / "mpi-hostfile"
    hosts.write_text("vitds-worker-0.vitds.default.svc slots=8\nvitds-worker-1.vitds.default.svc slots=8\n")
    text = start["args"][0].replace("/tmp/hostfile", str(cluster.output / "host file").replace(" ", "\\ "))
    environ = {
        "PATH": f"{cluster.bin}:/usr/bin:/bin", "LOG": str(cluster.log), "OUTPUT": str(cluster.output), "SLURM_NODEID": "0",
        "CONFIG": "a b.json", "OUTPUT_DIR": str(cluster.output), "OMPI_MCA_orte_default_hostfile": str(hosts), "WAIT": "1",
        "OUTCOME": outcome("preempted", 75), "EXIT": "75",
    }  # fmt: skip
    ready = Path(f"{cluster.log}.ready")
    with subprocess.Popen([*start["command"], text], cwd=cluster.work, env=environ) as pod:
        end = time.monotonic() + 120
        while not ready.exists():
            assert time.monotonic() < end and pod.poll() is None
            time.sleep(0.02)
        pod.terminate()
        assert pod.wait(120) == 75
    assert (cluster.log.parent / "log.host-0").read_text().splitlines()[2:4] == ["--launcher", "pdsh"]
    assert [host.slots for host in read_hostfile(cluster.log.parent / "log.hostfile")] == [8, 8]


def test_deepspeed_reads_the_environment_example():
    """By DeepSpeed's own rule, which knows no comments: what the example's command keeps is KEY=VALUE."""
    command = ["grep", "^[A-Z]", str(ROOT / "deepspeed_env.example")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    pairs = dict(line.split("=", maxsplit=1) for line in lines)
    assert {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"} <= pairs.keys()
    assert not any(set(value) & set("$`\"' ") for value in pairs.values())
