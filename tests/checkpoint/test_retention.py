"""What a run keeps, and what it never deletes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoint_ranks import small_checkpoint

from vitds.checkpoint import CheckpointSection, finish_deletions, newest_checkpoint, prune, remove_leftovers
from vitds.errors import UserError
from vitds.sections import Duration, parse


def steps(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in directory.iterdir())


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "newest", "kept"),
    [
        (1, None, None, [50]),
        (2, None, None, [40, 50]),
        (9, None, None, [10, 20, 30, 40, 50]),
        (1, 20, None, [20, 40, 50]),
        (2, 30, None, [30, 40, 50]),
        (1, None, 30, [30, 40, 50]),
    ],
)
def test_prune(tmp_path: Path, keep_last: int, keep_every: int | None, newest: int | None, kept: list[int]) -> None:
    paths = {step: small_checkpoint(tmp_path, step) for step in (10, 20, 30, 40, 50)}
    deleted = prune(tmp_path, keep_last, keep_every, paths.get(newest or 0))
    finish_deletions()
    assert steps(tmp_path) == kept
    assert sorted(deleted) == [path for step, path in paths.items() if step not in kept]


@pytest.mark.parametrize(
    ("skips", "safe", "kept"),
    [
        ([], None, [40, 50]),
        ([], 300, [30, 40, 50]),
        ([], 399, [30, 40, 50]),
        ([], 400, [40, 50]),
        ([], 99, [10, 40, 50]),
        ([(350, 450)], None, [20, 30]),  # 40 and 50 have learnt from it
        ([(350, 450)], 200, [20, 30]),
        ([(250, 450)], 120, [10, 20]),
        ([(0, 450)], None, [10, 20, 30, 40, 50]),  # nothing good is left: nothing is deleted
    ],
)
def test_what_a_rollback_would_go_back_to_is_kept(
    tmp_path: Path, skips: list[tuple[int, int]], safe: int | None, kept: list[int]
) -> None:
    for step in (10, 20, 30, 40, 50):
        path = small_checkpoint(tmp_path, step)
        state = json.loads((path / "training_state.json").read_text()) | {"position": 10 * step, "skipped": []}
        content = json.dumps(state)
        (path / "training_state.json").write_text(content)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"]["training_state.json"]["bytes"] = len(content)
        (path / "manifest.json").write_text(json.dumps(manifest))
    prune(tmp_path, 2, None, skips=skips, safe=safe)
    finish_deletions()
    assert steps(tmp_path) == kept


def test_the_only_whole_one_is_never_deleted(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        path = small_checkpoint(tmp_path, step)
        if step > 10:
            (path / "training_state.json").unlink()
    assert prune(tmp_path, 1, None) == []
    checkpoint = newest_checkpoint(tmp_path, report=lambda line: None)
    assert checkpoint is not None
    assert checkpoint.step == 10


def test_what_cannot_be_deleted_does_not_stop_the_run(tmp_path: Path) -> None:
    for step in (10, 20):
        small_checkpoint(tmp_path, step)
    (tmp_path / "step-000000010.deleted.tmp").write_text("in the way")
    assert prune(tmp_path, 1, None) == []
    assert prune(tmp_path / "gone", 1, None) == []
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 20
    assert (tmp_path / "step-000000010").is_dir()


def test_leftovers_go_and_nothing_else(tmp_path: Path) -> None:
    small_checkpoint(tmp_path, 10)
    (tmp_path / "bandwidth-3.tmp").write_text("x")
    gone = ["step-000000010.deleted.tmp", "step-000000010.replaced.tmp", "step-000000020.tmp"]
    for name in (*gone, "mine.tmp", "step-20.tmp"):
        (tmp_path / name).mkdir()
    assert [path.name for path in remove_leftovers(tmp_path)] == ["bandwidth-3.tmp", *gone]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.tmp", "step-000000010", "step-20.tmp"]
    assert remove_leftovers(tmp_path / "none") == []


def test_section() -> None:
    section = parse(CheckpointSection, {"every_epochs": 2, "keep_last": 3}, "vitds.checkpoint")
    assert section == CheckpointSection(Duration(2, "epochs"), 3, None, "full")
    for wrong in ({"keep_last": 0}, {"keep_every_steps": 0}, {"verify": "fully"}, {"every": 3}):
        with pytest.raises(UserError, match=r"vitds\.checkpoint"):
            parse(CheckpointSection, wrong, "vitds.checkpoint")
