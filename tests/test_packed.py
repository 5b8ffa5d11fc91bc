"""Folder or tar shards, one stream: the same images give the same metrics, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.digit_files import write_folders, write_tars
from tests.launching import train_alone
from tests.test_launch import DIGITS, SMALL, outcome
from vitds.metrics import read_metrics

pytestmark = pytest.mark.launch
WINDOWED = ["vitds.data.order.kind=windowed", *(f"vitds.data.order.{word}" for word in ("run_images=4", "block_images=32", "window_blocks=8"))]  # fmt: skip


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict[str, list[str]]:
    """The digits by class in folders, and in tars of uneven sizes, one of them empty and one of a single image."""
    root = tmp_path_factory.mktemp("digits")
    folders = write_folders(root)
    for role in ("train", "eval"):
        write_tars(root / role, root / "tars" / role, (200, 0, 1, 150))
    tars = [
        f"vitds.data.{role}.{word}" for role in ("train", "eval") for word in ("source=tar", f"path={root}/tars/{role}")
    ]
    return {"folder": folders, "tar": tars}


def curve(run: Path, *sets: str) -> list[dict[str, float]]:
    """All that is measured of the model and the data, step by step."""
    done = train_alone(2, DIGITS, run, *SMALL, *sets)
    assert outcome(run)["state"] == "finished", done.stdout[-3000:]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in read_metrics(run)]


@pytest.mark.parametrize("order", [[], WINDOWED], ids=["full", "windowed"])
def test_tars_of_a_folder_train_as_the_folder_does(stored, tmp_path, order):
    in_folders = curve(tmp_path / "folder", *stored["folder"], *order)
    in_tars = curve(tmp_path / "tar", *stored["tar"], *order, "vitds.data.num_workers=2")
    assert len(in_folders) == 12
    assert {"train/loss", "train/grad_norm", "eval/top1", "data/bad_samples"} <= in_folders[-1].keys()
    assert in_tars == in_folders
