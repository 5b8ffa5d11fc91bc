"""The user's own command on two real hosts: the same run as on one, under ZeRO-2 and 3."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cluster.hosts import Hosts, two_hosts, why_not
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


@pytest.mark.parametrize("stage", [2, 3])
def test_two_hosts_train_what_one_does(hosts, on_one_host, tmp_path, stage):
    run = tmp_path / "run"
    done = hosts.deepspeed(
        hosts.hostfile(alpha=1, beta=1), TRAIN, "--config", str(run_file(tmp_path)), "--output-dir", str(run),
        "--set", f"zero_optimization.stage={stage}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert outcome(run)["state"] == "finished"
    assert not hosts.alpha.processes()
    assert not hosts.beta.processes()
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
