"""A run and its images, by the user's own command: bad ones, unreadable ones, and others in their place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.digit_files import write_folders
from tests.launching import train_alone
from tests.test_launch import DIGITS, SMALL, outcome
from vitds.data import SourceSection
from vitds.data.folder import Folder
from vitds.data.order import order
from vitds.json_files import read_rows
from vitds.metrics import read_metrics

pytestmark = pytest.mark.launch
GLOBAL_BATCH, STEPS = 24, 12
BAD_AT = (5, 30, 100, 101, 200)  # positions of training images that are torn
GONE_AT = 9 * GLOBAL_BATCH + 20  # of the second rank, after the checkpoint of step 8
RUN = [*SMALL, 'vitds.plugins=["tests.mishaps"]', "vitds.train.diagnostics_every_steps=0"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, list[str], list[str]]:
    """The folder, its overrides, and the keys of what is bad in training."""
    root = tmp_path_factory.mktemp("digits")
    sets = write_folders(root)
    keys = [key_at(root, position) for position in BAD_AT]
    for torn in (*(root / "train" / key for key in keys), *sorted((root / "eval").glob("*/*.png"))[7:300:200]):
        torn.write_bytes(torn.read_bytes()[:50])
    return root, sets, sorted(keys)


def key_at(root: Path, position: int) -> str:
    folder = Folder(SourceSection("folder", path=str(root / "train")), "train")
    return folder.key(order(0, position, len(folder)))


@pytest.fixture(scope="module")
def unbroken(files, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    done = train_alone(2, DIGITS, run, *RUN, *files[1], "vitds.data.num_workers=1")
    assert outcome(run)["state"] == "finished", done.stdout[-3000:]
    return run


def bad(run: Path, role: str) -> list[tuple[str, str]]:
    return sorted((row["key"], row["reason"]) for row in read_rows(run / "bad_samples.jsonl") if row["role"] == role)


def curve(run: Path, *names: str) -> list[list[float | None]]:
    return [[row.get(name) for name in names] for row in read_metrics(run)]


def test_bad_samples_are_listed_and_counted_once(unbroken, files):
    assert [key for key, _ in bad(unbroken, "train")] == files[2]
    assert len(bad(unbroken, "eval")) == 2, "evaluated twice"
    assert all(reason for _, reason in bad(unbroken, "train"))
    rows = read_metrics(unbroken)
    found = [sum(position < GLOBAL_BATCH * (step + 1) for position in BAD_AT) for step in range(STEPS)]
    assert [row["data/bad_samples"] for row in rows] == found
    assert [row.get("data/bad_samples_eval") for row in rows] == [None] * 5 + [2] + [None] * 5 + [2]
    assert rows[-1]["eval/images"] == 360 - 2


def test_the_cap_ends_all_ranks_and_a_higher_one_goes_on(unbroken, files, tmp_path):
    """Each of the two ranks meets fewer than the cap."""
    run = tmp_path / "run"
    sets = [*RUN, *files[1], "vitds.checkpoint.every_steps=100"]
    done = train_alone(2, DIGITS, run, *sets, "vitds.data.max_bad_samples=3")
    (line,) = [line for line in done.stdout.splitlines() if "cannot be used" in line]
    assert line.startswith("vitds: vitds.data.train: 4 images cannot be used (vitds.data.max_bad_samples is 3): ")
    assert files[2][0].split("/")[1] in done.stdout
    assert "Traceback" not in done.stdout, done.stdout
    assert (done.returncode, outcome(run)["state"], outcome(run)["exit_code"]) == (2, "failed", 2)
    step = BAD_AT[3] // GLOBAL_BATCH
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{step:09d}"]
    went_on = train_alone(2, DIGITS, run, *sets, "vitds.data.max_bad_samples=5")
    assert outcome(run)["state"] == "finished", went_on.stdout[-3000:]
    names = ("step", "train/loss", "train/grad_norm", "data/bad_samples", "eval/loss")
    assert curve(run, *names) == curve(unbroken, *names)
    for role in ("train", "eval"):
        assert bad(run, role) == bad(unbroken, role)


def test_one_rank_that_is_killed_and_goes_on_finds_the_same(unbroken, files, tmp_path):
    run = tmp_path / "run"
    gone = train_alone(1, DIGITS, run, *RUN, *files[1], VITDS_TEST_DIE="10")
    assert gone.returncode != 0
    assert outcome(run)["state"] == "running"
    again = train_alone(1, DIGITS, run, *RUN, *files[1])
    assert outcome(run)["state"] == "finished", again.stdout[-3000:]
    assert f"resumed from {run}/checkpoints/step-000000008" in again.stdout
    for role in ("train", "eval"):
        assert bad(run, role) == bad(unbroken, role)
    assert curve(run, "data/bad_samples") == curve(unbroken, "data/bad_samples")
    ours, theirs = ([loss for (loss,) in curve(one, "train/loss")] for one in (run, unbroken))
    assert ours == pytest.approx(theirs, rel=5e-3)  # other sums in bf16


def test_storage_that_fails_changes_nothing_of_the_run(unbroken, files, tmp_path):
    run, root = tmp_path / "run", files[0]
    image = root / "train" / key_at(root, GONE_AT)
    sets = [*RUN, *files[1], "vitds.data.num_workers=1"]
    failed = train_alone(2, DIGITS, run, *sets, VITDS_TEST_GONE=str(image))
    try:
        found = outcome(run)
        assert (found["state"], found["exit_code"], found["incident"]["what"]) == ("failed", 1, "crash"), failed.stdout
        assert found["incident"]["ranks"] == [1]
        assert f"{image}: cannot be read (No such file or directory), 3 attempts" in found["incident"]["message"]
        assert failed.returncode == 1
        assert "the same command goes on from there" in failed.stdout
        refused = train_alone(2, DIGITS, run, *sets)
        assert refused.returncode == 2
        assert "holds a run on other training images: 1437 images then, 1436 now" in refused.stdout
    finally:
        Path(f"{image}.gone").rename(image)
    again = train_alone(2, DIGITS, run, *sets)
    assert outcome(run)["state"] == "finished", again.stdout[-3000:]
    names = ("step", "train/loss", "train/grad_norm", "eval/loss")
    assert curve(run, *names) == curve(unbroken, *names)


def test_other_evaluation_images_are_said_and_allowed(unbroken, files, tmp_path):
    """A complete run is started once more, from a copy of its files with one evaluation image fewer."""
    root = tmp_path / "copy"
    sets = write_folders(root)
    next((root / "eval").glob("*/*.png")).unlink()
    done = train_alone(2, DIGITS, unbroken, *RUN, *sets, "vitds.data.num_workers=1")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "vitds.data.eval: other images than at the last start: 360 images then, 359 now" in done.stdout
    (event,) = [row for row in read_rows(unbroken / "events.jsonl") if row["kind"] == "images"]
    assert event["role"] == "eval"
    assert json.loads((unbroken / "images.json").read_text())["eval"]["images"] == 359
