"""A loss that leaps sends the run back to before what made it leap, and the run ends as if it had never seen that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.launching import train_alone
from tests.test_launch import DIGITS, SMALL, outcome
from tests.wrong_labels import GLOBAL_BATCH, WRONG_STEP
from vitds.config import load_run_file, prepare
from vitds.errors import UserError
from vitds.metrics import read_metrics

STEPS, GIVEN_UP = 18, 4
WENT_BACK_TO = WRONG_STEP + 1 - GIVEN_UP
SKIPPED = [GLOBAL_BATCH * WENT_BACK_TO, GLOBAL_BATCH * (WRONG_STEP + 1)]
GUARDED = [
    *(s for s in SMALL if "total_steps" not in s and "checkpoint" not in s), f"vitds.train.total_steps={STEPS}", 'vitds.plugins=["tests.wrong_labels"]',
    "vitds.data.train.source=wrong digits", "vitds.data.eval.source=wrong digits", "vitds.ema.decay=0.8", "vitds.guard.spike=rollback",
    "vitds.guard.spike_window=8", f"vitds.guard.spike_batches={GIVEN_UP}",
    "vitds.checkpoint.every_steps=1",  # the two newest have always learnt from what is given up
]  # fmt: skip


def events(run: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def tensors(run: Path) -> dict:
    files = sorted((run / "checkpoints" / f"step-{STEPS:09d}").glob("*.safetensors"))
    assert len(files) == 3, files
    return {f"{file.name} {name}": value for file in files for name, value in load_file(file).items()}


@pytest.mark.launch
def test_a_leap_is_rolled_back_also_by_a_run_that_dies_in_between(tmp_path):
    rolled, died, never = (tmp_path / name for name in ("rolled", "died", "never"))
    done = train_alone(2, DIGITS, rolled, *GUARDED, VITDS_TEST_SLOW_DISK="1")
    assert outcome(rolled)["state"] == "finished", done.stdout[-6000:]
    assert "the loss leapt to" in done.stdout, done.stdout[-6000:]
    (skip,) = json.loads((rolled / "skips.json").read_text())["skips"]
    assert [skip["start"], skip["end"]] == SKIPPED
    assert skip["step"] == WRONG_STEP
    # It was still being written when the loss leapt; it becomes a checkpoint, and like those before it is passed over.
    assert [row["step"] for row in events(rolled, "save")].count(WRONG_STEP) == 2
    for step in (WRONG_STEP, WRONG_STEP - 1):
        assert f"step-{step:09d}: it learnt from positions" in done.stdout, done.stdout[-6000:]
    assert f"going back to {rolled}/checkpoints/step-{WENT_BACK_TO:09d}" in done.stdout, done.stdout[-6000:]
    (rollback,) = events(rolled, "rollback")
    assert rollback["positions"] == SKIPPED

    gone = train_alone(2, DIGITS, died, *GUARDED, VITDS_TEST_DIE="1")
    assert gone.returncode != 0
    assert outcome(died)["state"] != "finished"
    again = train_alone(2, DIGITS, died, *GUARDED)
    assert outcome(died)["state"] == "finished", again.stdout[-6000:]
    assert "the loss leapt" not in again.stdout, again.stdout[-6000:]
    assert f"step-{WRONG_STEP - 1:09d}: it learnt from positions" in again.stdout, again.stdout[-6000:]
    assert events(died, "start")[-1]["step"] == WENT_BACK_TO

    never.mkdir()
    shutil.copy(rolled / "skips.json", never)
    done = train_alone(2, DIGITS, never, *GUARDED)
    assert outcome(never)["state"] == "finished", done.stdout[-6000:]
    assert not events(never, "rollback")

    wanted = tensors(never)
    for run in (rolled, died):
        found = tensors(run)
        assert found.keys() == wanted.keys()
        assert [name for name, value in found.items() if not value.equal(wanted[name])] == []
        for ours, theirs in zip(read_metrics(run), read_metrics(never), strict=True):
            assert {k: v for k, v in ours.items() if k.startswith(("train/", "eval"))} == {
                k: v for k, v in theirs.items() if k.startswith(("train/", "eval"))
            }
    state = json.loads((rolled / "checkpoints" / f"step-{STEPS:09d}" / "training_state.json").read_text())
    assert state["skipped"] == [SKIPPED]
    assert state["images_seen"] == STEPS * GLOBAL_BATCH
    assert state["position"] == (STEPS + GIVEN_UP) * GLOBAL_BATCH


@pytest.mark.launch
def test_a_leap_stops_the_run_where_that_is_the_policy(tmp_path):
    done = train_alone(2, DIGITS, tmp_path / "run", *GUARDED, "vitds.guard.spike=stop")
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("vitds: ")][:1]
    assert f"step {WRONG_STEP}, images from position {WRONG_STEP * GLOBAL_BATCH}: the loss is" in line
    assert outcome(tmp_path / "run")["state"] == "failed"
    assert not (tmp_path / "run" / "skips.json").exists()


def test_rolling_back_needs_something_to_go_back_to():
    run = load_run_file(str(DIGITS), ["vitds.guard.spike=rollback", "vitds.checkpoint.every_steps=0"], world_size=2)
    with pytest.raises(UserError, match=r"leaves a rollback \(vitds\.guard\.spike\) nothing to go back to"):
        prepare(run)
