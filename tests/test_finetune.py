"""Fine-tuning by the user's own command: from a run's directory, another resolution, a new classifier, a part frozen, an average
and held-out images; killed on its way it ends with the bits of the unbroken one."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import ROOT, train, train_alone
from vitds.json_files import read_rows
from vitds.metrics import read_metrics

pytestmark = pytest.mark.launch
SMALL = [
    "train_batch_size=24",
    "vitds.train.log_every_steps=1",
    "vitds.model.depth=2",
    "vitds.train.diagnostics_every_steps=0",
]
FROZEN = r"patch_embed\..*|pos_embed|blocks\.0\..*"
FINETUNE = [
    *SMALL, "vitds.train.total_steps=8", "vitds.train.eval_every_steps=4", "vitds.checkpoint.every_steps=3", "vitds.data.minival=0.05",
    "scheduler.params.warmup_steps=2", 'vitds.plugins=["tests.mishaps"]',
    "vitds.groups=" + json.dumps([[FROZEN, {"frozen": True}], [r"blocks\.1\..*", {"lr_mult": 0.5}]]),
]  # fmt: skip
RUN_FILE = ROOT / "ds_configs" / "finetune_digits.json"


def outcome(run: Path) -> str:
    return str(json.loads((run / "outcome.json").read_text())["state"])


def tensors(run: Path, step: int, kind: str = "model") -> dict[str, torch.Tensor]:
    files = sorted((run / "checkpoints" / f"step-{step:09d}").glob(f"{kind}*.safetensors"))
    files = [file for file in files if kind != "model" or not file.name.startswith("model.ema")]
    return {name: value for file in files for name, value in load_file(file).items()}


@pytest.fixture(scope="module")
def trunk(tmp_path_factory) -> Path:
    """A run of which everything is trained, with Adafactor, in one rank."""
    run = tmp_path_factory.mktemp("trunk") / "run"
    sets = [*SMALL, "vitds.train.total_steps=6", "vitds.checkpoint.every_steps=3", "scheduler.params={}"]
    done = train_alone(1, ROOT / "ds_configs" / "digits.json", run, *sets)
    assert outcome(run) == "finished", done.stdout[-3000:]
    return run


@pytest.fixture(scope="module")
def unbroken(trunk, tmp_path_factory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    done = train(2, RUN_FILE, run, *FINETUNE, f"vitds.init_from.path={trunk}")
    assert outcome(run) == "finished", done.stdout[-3000:]
    return run, done.stdout


def test_it_says_what_it_has_taken(unbroken, trunk):
    said = (
        f"vitds: vitds.init_from: weights from {trunk}/checkpoints/step-000000006; classifier starts at zero, as "
        "vitds.init_from.head says; position embedding resampled from 16 to 64 patches"
    )
    assert unbroken[1].count(said) == 1
    assert unbroken[1].index(said) < unbroken[1].index("wrapper DeepSpeedZeroOptimizer")


def test_frozen_parameters_are_those_of_the_trunk_and_have_no_state(unbroken, trunk):
    before, after, average = tensors(trunk, 6), tensors(unbroken[0], 8), tensors(unbroken[0], 8, "model.ema")
    state = {name.rsplit(".", 1)[0] for name in tensors(unbroken[0], 8, "optimizer")}
    for name, value in after.items():
        frozen = name.startswith(("patch_embed", "pos_embed", "blocks.0."))
        assert (name in state) != frozen, name
        if name == "pos_embed":
            assert value.shape == (1, 64, 64)
        else:
            assert torch.equal(value, before[name]) == frozen, name
        assert torch.equal(value, average[name]) == frozen, name


def test_minival_and_average_are_evaluated(unbroken):
    evaluated = [row for row in read_metrics(unbroken[0]) if "eval/top1" in row]
    assert [row["step"] for row in evaluated] == [4, 8]
    for row in evaluated:
        assert row["minival/images"] == row["minival_ema/images"] == 72  # 5 % of 1437
        assert row["eval/images"] == 360
        assert row["eval_ema/loss"] != row["eval/loss"]
    images = json.loads((unbroken[0] / "images.json").read_text())
    assert {role: card["images"] for role, card in images.items()} == {"train": 1365, "eval": 360, "minival": 72}


def test_killed_on_its_way_it_ends_with_the_same_bits_though_what_it_began_with_has_gone(unbroken, trunk, tmp_path):
    run, away = tmp_path / "run", trunk.with_name("away")
    gone = train(2, RUN_FILE, run, *FINETUNE, f"vitds.init_from.path={trunk}", VITDS_TEST_DIE="5")
    assert gone.returncode != 0
    os.rename(trunk, away)
    try:
        again = train(2, RUN_FILE, run, *FINETUNE, f"vitds.init_from.path={trunk}")
    finally:
        os.rename(away, trunk)
    assert outcome(run) == "finished", again.stdout[-3000:]
    assert f"resumed from {run}/checkpoints/step-000000003" in again.stdout
    for kind in ("model", "model.ema", "optimizer"):
        one, other = tensors(run, 8, kind), tensors(unbroken[0], 8, kind)
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []
    timed = {"time", "perf"}
    curves = [
        [{k: v for k, v in row.items() if k.split("/")[0] not in timed} for row in read_metrics(each)]
        for each in (run, unbroken[0])
    ]
    assert curves[0] == curves[1]
    assert [row["kind"] for row in read_rows(run / "events.jsonl")].count("start") == 2


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (
            ["vitds.data.minival=0.1"],
            "vitds.data.minival: .* holds a run on other training images: 1365 images then, 1293 now",
        ),
        (["vitds.groups=[]"], "holds another run, which differs in"),
    ],
    ids=["another minival", "other frozen groups"],
)
def test_it_goes_on_only_as_it_began(unbroken, trunk, sets, said):
    done = train_alone(2, RUN_FILE, unbroken[0], *FINETUNE, f"vitds.init_from.path={trunk}", *sets)
    assert done.returncode == 2
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("vitds: ")]
    assert re.search(said, done.stdout), line


def test_a_trunk_of_another_width_is_refused_before_anything_is_started(trunk, tmp_path):
    sets = [*FINETUNE, f"vitds.init_from.path={trunk}", "vitds.model.width=32"]
    done = train_alone(1, RUN_FILE, tmp_path / "run", *sets)
    assert done.returncode == 2
    assert "holds another model than vitds.model: width: 64 there, 32 here" in done.stdout
    assert not (tmp_path / "run").exists()
