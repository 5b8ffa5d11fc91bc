"""Folder or tar shards, one stream: the same images give the same metrics, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.digit_files import write_folders, write_tars
from tests.launching import train_alone
from tests.test_launch import DIGITS, SMALL, outcome
from vitds.cli import main
from vitds.metrics import read_metrics

pytestmark = pytest.mark.launch
WINDOWED = ["vitds.data.order.kind=windowed", *(f"vitds.data.order.{word}" for word in ("run_images=4", "block_images=32", "window_blocks=8"))]  # fmt: skip
RUN = [*SMALL, 'vitds.plugins=["tests.mishaps"]']
UNEVEN = (200, 0, 1, 150)
"""Images of the first shards; the last one holds the rest."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """root/train and root/eval: the digits by class in folders."""
    root = tmp_path_factory.mktemp("digits")
    write_folders(root)
    return root


def taken_from(source: str, root: Path) -> list[str]:
    return [
        f"vitds.data.{role}.{word}"
        for role in ("train", "eval")
        for word in (f"source={source}", f"path={root / role}")
    ]


def curve(run: Path) -> list[dict[str, float]]:
    """All that is measured of the model and the data, step by step."""
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in read_metrics(run)]


def trained(run: Path, *sets: str) -> list[dict[str, float]]:
    done = train_alone(2, DIGITS, run, *RUN, *sets)
    assert outcome(run)["state"] == "finished", done.stdout[-3000:]
    return curve(run)


@pytest.fixture(scope="module")
def in_folders(root, tmp_path_factory) -> list[dict[str, float]]:
    found = trained(tmp_path_factory.mktemp("folders") / "run", *taken_from("folder", root))
    assert [row["step"] for row in found] == list(range(1, 13))
    assert {"train/loss", "train/grad_norm", "eval/top1", "data/bad_samples"} <= found[-1].keys()
    return found


def test_what_vitds_packs_trains_as_the_folder_does(root, in_folders, tmp_path):
    for role in ("train", "eval"):
        words = ["--from", root / role, "--to", tmp_path / "packed" / role, "--no-shuffle", "--images-per-shard", 500]
        assert main(["data", "pack", *map(str, words)]) == 0
    assert len(list((tmp_path / "packed" / "train").glob("*.tar"))) == 3
    packed = taken_from("tar", tmp_path / "packed")
    assert trained(tmp_path / "run", *packed, "vitds.data.num_workers=2") == in_folders


def test_a_windowed_order_is_of_the_images_and_not_of_their_shards(root, in_folders, tmp_path):
    for role in ("train", "eval"):
        write_tars(root / role, tmp_path / "tars" / role, UNEVEN)
    in_tars = trained(tmp_path / "tar", *taken_from("tar", tmp_path / "tars"), *WINDOWED, "vitds.data.num_workers=2")
    assert in_tars == trained(tmp_path / "folder", *taken_from("folder", root), *WINDOWED)
    assert in_tars != in_folders


def test_a_shard_that_changes_under_a_run_is_noticed(root, in_folders, tmp_path):
    """And the right one put back, the run ends as if nothing had happened."""
    shutil.copytree(root / "train", tmp_path / "fewer")
    sorted((tmp_path / "fewer").glob("*/*.png"))[-1].unlink()
    for role in ("train", "eval"):
        write_tars(root / role, tmp_path / role, UNEVEN)
    write_tars(tmp_path / "fewer", tmp_path / "others", UNEVEN)
    shard, right = tmp_path / "train" / "shard-4.tar", tmp_path / "right"
    shutil.copy(shard, right)
    shutil.move(tmp_path / "others" / "shard-4.tar", f"{shard}.other")
    run, sets = tmp_path / "run", [*RUN, *taken_from("tar", tmp_path)]
    failed = train_alone(2, DIGITS, run, *sets, VITDS_TEST_OTHER=str(shard))
    found = outcome(run)
    assert (failed.returncode, found["state"]) == (1, "failed"), failed.stdout
    assert f"{shard}: the shard has changed since it was indexed" in found["incident"]["message"]
    refused = train_alone(2, DIGITS, run, *sets)
    assert refused.returncode == 2, refused.stdout
    assert "holds a run on other training images: 1437 images then, 1436 now" in refused.stdout
    shutil.move(right, shard)
    again = train_alone(2, DIGITS, run, *sets)
    assert outcome(run)["state"] == "finished", again.stdout[-3000:]
    assert curve(run) == in_folders
