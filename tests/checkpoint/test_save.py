"""What a save costs in memory, what it says when it cannot have it, and what a death at any point of it leaves."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from checkpoint_ranks import EXTRA, TRAINING_STATE, join, launch, leave, logical, save, shards, small_checkpoint

from vitds.checkpoint import Saver, newest_checkpoint, open_checkpoint, remove_leftovers
from vitds.checkpoint.directory import make_directory
from vitds.checkpoint.format import MODEL, OPTIMIZER
from vitds.errors import Stopped
from vitds.layout import Shard

MIB = 2**20
BUCKET, SLACK = 16 * MIB, 12 * MIB
NUM_TENSORS, NUMEL = 25, 2 * MIB  # 200 MiB of fp32


def growth_of(action: Callable[[], object]) -> int:
    """Bytes by which this process's resident memory exceeds, at its peak, what it was before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = memory("VmRSS")
    action()
    return memory("VmHWM") - before


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def measure(rank: int, world: int, root: Path) -> None:
    """Rank 0 holds 200 MiB, rank 1 nothing; both write half."""
    join(rank, world, root)
    numel = NUMEL if rank == 0 else 0
    weights = [
        Shard(f"t{i}", (NUMEL,), torch.full((numel,), float(i)), rank * NUMEL, torch_dist.group.WORLD)
        for i in range(NUM_TENSORS)
    ]
    tensors: dict[str, list[Shard]] = {MODEL: weights, OPTIMIZER: []}
    save(root / "warm", 1, [Shard("w", (3,), torch.ones(3))], [], {}, {})  # what libraries keep for themselves
    found: dict[str, Any] = {}
    savers = {
        "synchronous": Saver(root / "own", background=False, bucket_bytes=BUCKET, min_file_bytes=MIB),
        "background": Saver(root / "own", bucket_bytes=BUCKET, min_file_bytes=MIB),
    }
    for step, (name, saver) in enumerate([*savers.items(), ("again", savers["background"])]):

        def one(saver: Saver = saver, step: int = step) -> None:
            saver.begin(step, tensors, {}, {})
            saver.commit()

        found[name] = growth_of(one)
        torch_dist.barrier()
    found["share"] = savers["background"].plan(tensors)
    leave(found, rank, world, root)


def test_a_save_takes_one_copy_of_the_share_and_one_bucket(tmp_path: Path) -> None:
    for found in launch(2, tmp_path, measure):
        assert found["share"] == 13 * NUMEL * 4
        assert found["synchronous"] <= BUCKET + SLACK
        assert found["share"] - 2 * NUMEL * 4 <= found["background"] <= found["share"] + BUCKET + SLACK
        assert found["again"] <= BUCKET + SLACK


def beyond(rank: int, world: int, root: Path) -> None:
    """No host has a bucket of 2^60 bytes to spare."""
    join(rank, world, root)
    weights, state = (shards(tensors, rank, world) for tensors in logical())
    notes = []
    for background in (True, False):
        saved = save(root / "own", 12, weights, state, TRAINING_STATE, EXTRA, background=background, bucket_bytes=2**60)
        notes.append([saved.background, saved.note])
    leave({"notes": notes}, rank, world, root)


def test_a_host_without_room_saves_synchronously_and_says_so(tmp_path: Path) -> None:
    first, second = launch(2, tmp_path, beyond)
    assert first == second
    (background, note), silent = first["notes"]
    assert not background
    assert note.startswith("written synchronously: rank 0 on ")
    assert "GB of host memory to be had, 1152921504.61 GB wanted" in note
    assert silent == [False, None]
    checkpoint = newest_checkpoint(tmp_path / "own")
    assert checkpoint is not None
    assert checkpoint.training_state == TRAINING_STATE


def test_a_disk_that_is_too_small_is_said_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"1000000000\.0 GB needed, [0-9.]+ GB free at"):
        make_directory(tmp_path / "step-000000001.tmp", 10**18)
    assert list(tmp_path.iterdir()) == []


def test_weights_are_fp32_and_no_state_has_the_name_of_a_weight(tmp_path: Path) -> None:
    half, full = Shard("w", (2,), torch.ones(2).half()), Shard("w", (2,), torch.ones(2))
    for tensors, words in (
        ({MODEL: [half], OPTIMIZER: []}, "weights are saved as fp32, not torch.float16"),
        ({MODEL: [full], OPTIMIZER: [full]}, "tensor 'w' is both a weight and a state"),
    ):
        saver = Saver(tmp_path)
        with pytest.raises(Stopped, match=words):
            saver.begin(1, tensors, {}, {})
        assert not saver.pending
    assert list(tmp_path.iterdir()) == []


def test_state_that_comes_with_the_first_step_makes_the_share_larger(tmp_path: Path) -> None:
    weights, state = (shards(tensors, 0, 1) for tensors in logical())
    saver, sizes = Saver(tmp_path), []
    for step, optimizer in ((12, []), (13, state), (14, [])):
        saver.begin(step, {MODEL: weights, OPTIMIZER: optimizer}, {**TRAINING_STATE, "step": step}, EXTRA)
        saved = saver.commit()
        assert saved.background
        sizes.append(saved.bytes)
        assert open_checkpoint(saved.path).kinds[OPTIMIZER].keys() == {shard.name for shard in optimizer}
    assert sizes[0] == sizes[2] < sizes[1]


@pytest.mark.parametrize("background", [True, False])
def test_a_death_after_begin_leaves_nothing_that_looks_like_a_checkpoint(tmp_path: Path, background: bool) -> None:
    small_checkpoint(tmp_path, 10)
    pid = os.fork()
    if pid == 0:
        try:
            weights, state = (shards(tensors, 0, 1) for tensors in logical())
            saver = Saver(tmp_path, background=background)
            saver.begin(12, {MODEL: weights, OPTIMIZER: state}, TRAINING_STATE, EXTRA)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000010", "step-000000012.tmp"]
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 10
    assert [path.name for path in remove_leftovers(tmp_path)] == ["step-000000012.tmp"]


def test_a_replaced_checkpoint_takes_its_name_back_when_the_new_one_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_checkpoint(tmp_path)
    before = (path / "manifest.json").read_bytes()
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if source.name == "step-000000012.tmp":
            raise OSError(5, "Input/output error", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(Stopped, match="step-000000012.tmp: Input/output error; earlier ones are untouched"):
        small_checkpoint(tmp_path, file_bytes=10**9)
    assert [found.name for found in tmp_path.iterdir()] == ["step-000000012"]
    assert (path / "manifest.json").read_bytes() == before
