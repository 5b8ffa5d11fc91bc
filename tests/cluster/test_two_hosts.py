"""The user's own command on two real hosts: the same run as on one, under ZeRO-2 and 3."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cluster.hosts import INTERFACE, Hosts, two_hosts, why_not
from tests.launching import ROOT, train
from tests.test_launch import DIGITS, outcome
from vitds.metrics import read_metrics

pytestmark = [pytest.mark.launch, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]
STEPS = 12
TRAIN = ROOT / "launcher" / "train.py"


def run_file(directory: Path) -> Path:
    """Digits, twelve steps of it: over ssh a shell would take the JSON of `--set` apart."""
    config = json.loads(DIGITS.read_text())
    config |= {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 6}
    config["bf16"]["enabled"] = False
    config["scheduler"]["params"] = {"warmup_steps": 2, "timescale_steps": 4, "cooldown_steps": 4}
    config["vitds"]["model"]["depth"] = 1
    config["vitds"]["train"] |= {"total_steps": STEPS, "log_every_steps": 1, "eval_every_steps": STEPS}
    config["vitds"]["checkpoint"] = {"every_steps": 6}
    path = directory / "digits.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as found:
        yield found


@pytest.fixture(scope="module")
def on_one_host(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("one")
    train(2, run_file(directory), directory / "run")
    assert outcome(directory / "run")["state"] == "finished"
    return directory / "run"


def check_same(run: Path, on_one_host: Path) -> None:
    """The run ended as the one on one host, to rounding."""
    assert outcome(run)["state"] == "finished"
    for ours, theirs in zip(read_metrics(run), read_metrics(on_one_host), strict=True):
        keys = [key for key in theirs if key.startswith(("train/", "eval/"))]
        assert [ours[key] for key in keys] == pytest.approx([theirs[key] for key in keys], rel=1e-5), ours["step"]
    final = f"checkpoints/step-{STEPS:09d}"
    assert {f.name for f in (run / final).iterdir()} == {f.name for f in (on_one_host / final).iterdir()}
    found, wanted = (load_file(where / final / "model.safetensors") for where in (run, on_one_host))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if name.endswith(("qkv.bias", "kv.bias")):  # the key's part learns from rounding alone (docs/design.md §5)
            parts = [0, 2] if name.endswith("qkv.bias") else [1]
            found[name], tensor = (value.unflatten(0, (len(parts) + 1, -1))[parts] for value in (found[name], tensor))
        assert (found[name] - tensor).norm() <= 1e-3 * tensor.norm(), name


@pytest.mark.parametrize("stage", [2, 3])
def test_two_hosts_train_what_one_does(hosts, on_one_host, tmp_path, stage):
    run = tmp_path / "run"
    done = hosts.deepspeed(
        hosts.hostfile(alpha=1, beta=1), TRAIN, "--config", str(run_file(tmp_path)), "--output-dir", str(run),
        "--set", f"zero_optimization.stage={stage}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert not hosts.alpha.processes()
    assert not hosts.beta.processes()
    check_same(run, on_one_host)


def test_a_file_that_one_host_lacks_ends_the_start_on_all(hosts, tmp_path):
    (tmp_path / "here").mkdir()
    config = run_file(tmp_path / "here")
    hosts.beta.run("mount", "-t", "tmpfs", "tmpfs", str(config.parent))
    done = hosts.deepspeed(
        hosts.hostfile(alpha=1, beta=1), TRAIN, "--config", str(config), "--output-dir", str(tmp_path / "run")
    )
    assert done.returncode == 2, done.stdout[-6000:]
    assert f"alpha: vitds: {config}: no such file" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not os.environ.get("VITDS_TORTURE"), reason="make torture-cluster")
@pytest.mark.parametrize("launcher", ["no_ssh", "torchrun", "openmpi"])
def test_other_launchers_reach_two_hosts(hosts, on_one_host, tmp_path, launcher):
    """docs/multi-node.md, section 4."""
    if launcher == "openmpi" and shutil.which("mpirun") is None:
        pytest.skip("needs mpirun (package openmpi-bin)")
    run, hostfile = tmp_path / "run", str(hosts.hostfile(alpha=1, beta=1))
    train = [str(TRAIN), "--config", str(run_file(tmp_path)), "--output-dir", str(run)]
    deepspeed, torchrun = (str(Path(sys.executable).with_name(name)) for name in ("deepspeed", "torchrun"))
    if launcher == "openmpi":
        mpi = f"--allow-run-as-root -x MASTER_ADDR=alpha -x MASTER_PORT=29500 --mca btl_tcp_if_include {INTERFACE}"
        commands = [[deepspeed, "--hostfile", hostfile, "--launcher", "openmpi", "--launcher_args", mpi, *train]]
    elif launcher == "no_ssh":
        apart = [deepspeed, "--hostfile", hostfile, "--no_ssh", "--master_addr", "alpha"]
        commands = [[*apart, "--node_rank", str(node), *train] for node in range(2)]
    else:
        together = [
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            "alpha:29500",
            "--nnodes",
            "2",
            "--nproc_per_node",
            "1",
        ]
        commands = [[torchrun, *together, *train]] * 2
    started = [hosts.start_on(host, *words) for host, words in zip(hosts.all, commands, strict=False)]
    printed = [process.communicate(timeout=240)[0] for process in started]
    assert not any(process.returncode for process in started), "\n".join(printed)[-6000:]
    check_same(run, on_one_host)
