"""The user's own command: trains, goes on with the same numbers, and says plainly what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launching import ROOT, TRAINER, ranks, train, train_alone
from vitds.metrics import read_metrics

pytestmark = pytest.mark.launch
SMALL = [
    "vitds.train.total_steps=12", "vitds.checkpoint.every_steps=4", "vitds.train.log_every_steps=1", "vitds.train.eval_every_steps=6",
    "vitds.train.diagnostics_every_steps=5", "train_batch_size=24", "train_micro_batch_size_per_gpu=6", "vitds.model.depth=1",
    'scheduler.params={"warmup_steps":2,"timescale_steps":4,"cooldown_steps":4}',
]  # fmt: skip
DIGITS = ROOT / "ds_configs" / "digits.json"


def outcome(run: Path) -> dict:
    return json.loads((run / "outcome.json").read_text())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    done = train(2, DIGITS, run, *SMALL)
    assert (run / "outcome.json").exists(), done.stdout[-3000:]
    assert outcome(run)["state"] == "finished", done.stdout[-3000:]
    assert done.returncode == 0, done.stdout[-3000:]
    assert "step 12/12 100%" in done.stdout
    assert "tensorboard --logdir" in done.stdout
    return run


def test_the_run_directory_is_what_the_design_says(unbroken):
    names = {path.name for path in unbroken.iterdir()}
    assert {"config.json", "metrics.jsonl", "events.jsonl", "outcome.json", "tensorboard", "checkpoints"} <= names
    assert [p.name for p in sorted((unbroken / "checkpoints").iterdir())] == ["step-000000008", "step-000000012"]
    files = {path.name for path in (unbroken / "checkpoints" / "step-000000012").iterdir()}
    assert {
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
        "training_state.json",
        "manifest.json",
        "README.md",
    } <= files
    rows = read_metrics(unbroken)
    assert [row["step"] for row in rows] == list(range(1, 13))
    last = rows[-1]
    assert {
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "train/images_seen",
        "perf/images_per_second",
        "perf/data_wait",
        "perf/peak_memory_gib",
        "eval/top1",
    } <= set(last)
    assert last["train/images_seen"] == 12 * 24
    assert rows[0]["train/lr"] == 0.0
    assert {"train/grad_norm/blocks.0", "train/param_norm/head", "train/update_rms/attn_pool"} <= set(rows[4])
    kinds = [json.loads(line)["kind"] for line in (unbroken / "events.jsonl").read_text().splitlines()]
    assert kinds[0] == "start"
    assert kinds[-1] == "finish"


def test_the_checkpoint_opens_with_transformers_alone(unbroken):
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    import vitds  # noqa: F401  registers the classes
    from vitds.data.digits import Digits
    from vitds.data.section import SourceSection

    path = unbroken / "checkpoints" / "step-000000012"
    model = AutoModelForImageClassification.from_pretrained(path)
    processor = AutoImageProcessor.from_pretrained(path)
    digits = Digits(SourceSection("digits"), "eval")
    pixels = processor(images=[digits.read(i)[0] for i in range(len(digits))], return_tensors="pt")
    with torch.no_grad():
        right = (model(**pixels).logits.argmax(-1) == torch.tensor(digits.labels)).float().mean().item()
    # fp32 here, bf16 in training: a logit or two may tie otherwise.
    assert right == pytest.approx(read_metrics(unbroken)[-1]["eval/top1"], abs=0.02)


def test_a_complete_run_has_nothing_left_to_do(unbroken):
    """Killed on its way it would end with the same bits: tests/torture/test_killed.py."""
    kept = {path: path.read_bytes() for path in unbroken.rglob("*") if path.is_file() and path.parent != unbroken}
    rows = read_metrics(unbroken)
    again = train(2, DIGITS, unbroken, *SMALL)
    assert again.returncode == 0, again.stdout[-3000:]
    assert "resumed from" in again.stdout
    assert "this run is complete" in again.stdout
    assert outcome(unbroken)["state"] == "finished"
    assert read_metrics(unbroken) == rows
    assert {path: path.read_bytes() for path in kept} == kept


@pytest.mark.parametrize(
    ("sets", "hint"),
    [
        (["gradient_cliping=1"], "did you mean 'gradient_clipping'"),
        (["vitds.model.width=32"], "holds another run"),
        (["vitds.train.total_steps=11"], "is 12 steps on"),
    ],
    ids=["typo", "another run", "total behind the checkpoint"],
)
def test_a_mistake_is_one_message_and_exit_code_2(unbroken, sets, hint):
    before = {path: path.read_bytes() for path in unbroken.rglob("*") if path.is_file()}
    done = train(2, DIGITS, unbroken, *SMALL, *sets)
    assert done.stdout.count("vitds: ") == 1, done.stdout
    assert hint in done.stdout
    assert "Traceback" not in done.stdout
    assert done.returncode == 2
    after = {path: path.read_bytes() for path in unbroken.rglob("*") if path.is_file()}
    assert after == before, "a refused start changed the run's directory"


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    run = tmp_path / "run"
    done = train(
        2, DIGITS, run, *SMALL, "optimizer.params.lr=1e30", "scheduler.params={}", "vitds.checkpoint.every_steps=1"
    )
    assert "Traceback" not in done.stdout
    what, where = [line for line in done.stdout.splitlines() if "vitds: " in line]
    assert "nan" in what or "inf" in what, what
    assert "is the first that is not finite, on rank 0" in what
    assert "of images digits/" in what
    assert "the last checkpoint is" in where
    assert done.returncode == 1
    assert outcome(run)["state"] == "failed"


def test_skipping_gives_up_after_so_many_batches_in_a_row(tmp_path):
    """In fp32 without ZeRO, where DeepSpeed itself would have stepped with these gradients."""
    run = tmp_path / "run"
    sets = ["zero_optimization.stage=0", "bf16.enabled=false", "vitds.guard.nonfinite=skip", "vitds.guard.max_skips=2"]
    done = train_alone(2, DIGITS, run, *SMALL, *sets, "optimizer.params.lr=1e30", "scheduler.params={}")
    assert done.returncode == 1
    assert "3 time(s) in a row" in done.stdout, done.stdout[-2000:]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    skips = [event["positions"] for event in events if event["kind"] == "skip"]
    assert len(skips) == 2
    assert skips[1][0] == skips[0][1]


def test_a_cooldown_is_forked_from_a_trunk(unbroken, tmp_path):
    """init_from.what = all with another total: step 8 is before both cooldowns. tests/checkpoint/test_state.py: step 12 is
    past the first, and refused."""
    longer = [s for s in SMALL if "total_steps" not in s] + ["vitds.train.total_steps=16"]
    run, trunk = tmp_path / "run", unbroken / "checkpoints"
    source = [f"vitds.init_from.path={trunk / 'step-000000008'}", "vitds.init_from.what=all"]
    done = train_alone(2, DIGITS, run, *longer, *source)
    assert outcome(run)["state"] == "finished", done.stdout[-3000:]
    assert "forked from" in done.stdout
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(9, 17))
    assert rows[0]["train/images_seen"] == 9 * 24
    assert rows[0]["train/loss"] == read_metrics(unbroken)[8]["train/loss"], "the stream goes on where the trunk was"


def test_weights_go_into_a_model_of_another_size_with_other_classes(unbroken, tmp_path):
    weights = unbroken / "checkpoints" / "step-000000012"
    sets = [
        f"vitds.init_from.path={weights}", "vitds.model.image_size=12", "vitds.model.num_classes=11", "vitds.train.total_steps=3",
        'vitds.data.train.transforms=["resize"]', 'vitds.data.eval.transforms=["resize"]', "scheduler.params={}",
    ]  # fmt: skip
    done = train_alone(2, DIGITS, tmp_path / "run", *[s for s in SMALL if "total_steps" not in s], *sets)
    assert outcome(tmp_path / "run")["state"] == "finished", done.stdout[-3000:]
    said = "classifier starts at zero: 10 classes there, 11 here; position embedding resampled from 16 to 36 patches"
    assert f"vitds: vitds.init_from: weights from {weights}; {said}" in done.stdout  # before anything is started
    assert f"{said}: step 0 of 3" in done.stdout


def test_help_is_no_failure():
    done = ranks(1, TRAINER, "--help")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "--ignore-forecast" in done.stdout
    assert "Traceback" not in done.stdout
