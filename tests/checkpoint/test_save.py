"""What a save costs in memory, what it says when it cannot have it, and what a death at any point of it leaves."""

from __future__ import annotations

import gc
import os
import re
import resource
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from checkpoint_ranks import (
    EXTRA,
    TRAINING_STATE,
    failure_of,
    join,
    launch,
    leave,
    logical,
    save,
    shards,
    small_checkpoint,
)
from safetensors.torch import load_file

from vitds.checkpoint import Saver, gather, newest_checkpoint, open_checkpoint, remove_leftovers
from vitds.checkpoint import save as save_module
from vitds.checkpoint.directory import make_directory
from vitds.checkpoint.format import MODEL, OPTIMIZER
from vitds.checkpoint.gather import Plan
from vitds.checkpoint.plan import PlannedFile
from vitds.checkpoint.share import write_share
from vitds.checkpoint.tensorfile import TensorSpec, bytes_of
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


def memory(name: str, of: int | str = "self") -> int:
    lines = Path(f"/proc/{of}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def lopsided(rank: int) -> dict[str, list[Shard]]:
    """All on the first of two ranks."""
    numel = NUMEL if rank == 0 else 0
    weights = [
        Shard(f"t{i}", (NUMEL,), torch.full((numel,), float(i)), rank * NUMEL, torch_dist.group.WORLD)
        for i in range(NUM_TENSORS)
    ]
    return {MODEL: weights, OPTIMIZER: []}


def measure(rank: int, world: int, root: Path) -> None:
    """Rank 0 holds 200 MiB, rank 1 nothing; both write half."""
    join(rank, world, root)
    tensors = lopsided(rank)
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
    """Rank 1's host has 100 bytes left."""
    join(rank, world, root)
    if rank == 1:
        save_module.available_bytes = lambda: 100
    weights, state = (shards(tensors, rank, world) for tensors in logical())
    notes = []
    for background in (True, False):
        saved = save(root / "own", 12, weights, state, TRAINING_STATE, EXTRA, background=background)
        notes.append([saved.background, saved.note])
    leave({"notes": notes}, rank, world, root)


def test_a_host_without_room_saves_synchronously_and_says_so(tmp_path: Path) -> None:
    first, second = launch(2, tmp_path, beyond)
    assert first == second
    (background, note), silent = first["notes"]
    assert not background
    assert note.startswith("written synchronously: rank 1 on ")
    assert "0.00 GB of host memory to be had, 0.00 GB wanted for a copy of its share and a bucket" in note
    assert silent == [False, None]
    checkpoint = newest_checkpoint(tmp_path / "own")
    assert checkpoint is not None
    assert checkpoint.training_state == TRAINING_STATE


def test_a_small_model_needs_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the bucket might be: it is no larger than what travels."""
    monkeypatch.setattr(save_module, "available_bytes", lambda: 100_000)
    weights, state = (shards(tensors, 0, 1) for tensors in logical())
    assert save(tmp_path, 12, weights, state, TRAINING_STATE, EXTRA, bucket_bytes=2**60).background


@pytest.mark.parametrize("background", [True, False])
def test_the_bucket_is_given_back_when_the_state_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def bucket_for(plan: Plan) -> torch.Tensor:
        bucket = gather.bucket_for(plan)
        made.append(weakref.ref(bucket))
        return bucket

    monkeypatch.setattr(save_module, "bucket_for", bucket_for)
    saver = Saver(tmp_path, background=background)
    saver.begin(1, {MODEL: [Shard("w", (3,), torch.ones(3))], OPTIMIZER: []}, {}, {})
    assert [bucket() for bucket in made] == [None]
    saver.commit()


def without_a_bucket(rank: int, world: int, root: Path) -> None:
    """Rank 0 holds 200 MiB, of which rank 1 writes half; but rank 1 cannot have a bucket of 64 MiB."""
    join(rank, world, root)
    tensors = lopsided(rank)
    found: dict[str, Any] = {}
    for background in (False, True):
        saver = Saver(root / "own", background=background, bucket_bytes=64 * MIB, min_file_bytes=MIB)
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + 24 * MIB, hard))
        found[str(background)] = failure_of(lambda saver=saver: saver.begin(1, tensors, {}, {}))
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        torch_dist.barrier()
        found[f"{background} left"] = [path.name for path in (root / "own").iterdir()], saver.pending
        torch_dist.barrier()
        saver.begin(2, tensors, {}, {})
        found[f"{background} then"] = saver.commit().path.name
    leave(found, rank, world, root)


def test_a_rank_that_cannot_have_a_bucket_stops_all_before_data_moves(tmp_path: Path) -> None:
    first, second = launch(2, tmp_path, without_a_bucket)
    assert first == second
    for background, there in (("False", []), ("True", ["step-000000002"])):
        assert re.search("rank 1 on .*: no room on cpu for a bucket of 67.1 MB to send and receive", first[background])
        assert first[f"{background} left"] == [there, False]
        assert first[f"{background} then"] == "step-000000002"


def test_only_what_writing_raises_is_the_writers(tmp_path: Path) -> None:
    """What the source of the bytes raises leaves other ranks waiting, so that nobody may wait for them in turn."""
    (shard,) = [Shard("w", (4,), torch.ones(4))]
    files = [PlannedFile(MODEL, "model.safetensors", 0, (TensorSpec(shard.name, shard.shape, torch.float32),))]

    def pieces(error: Exception | None) -> Iterator[memoryview]:
        yield bytes_of(shard.data)[:5]
        if error is not None:
            raise error
        yield bytes_of(shard.data)[5:]
        ended.append(True)

    ended: list[bool] = []
    with pytest.raises(OSError, match="the wire"):
        write_share(tmp_path, {}, files, pieces(OSError("the wire")))
    written = write_share(tmp_path, {}, files, pieces(None))
    assert written.failure == f"{tmp_path}/model.safetensors: File exists"
    assert ended == [True]
    (tmp_path / "model.safetensors").unlink()
    written = write_share(tmp_path, {}, files, pieces(None))
    assert (written.failure, list(written.records)) == (None, ["model.safetensors"])
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], shard.data)


def test_a_thread_that_cannot_be_started_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    saver = Saver(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        saver.begin(1, {MODEL: [Shard("w", (3,), torch.ones(3))], OPTIMIZER: []}, {}, {})
    assert not saver.busy
    with pytest.raises(Stopped, match="can't start new thread"):
        saver.commit()
    assert list(tmp_path.iterdir()) == []


def test_forked_processes_have_no_part_in_the_copy_of_the_share(tmp_path: Path) -> None:
    """Else the next save, while a loader's workers live, would leave them the old copy and make a new one."""
    tensors: dict[str, list[Shard]] = {MODEL: [Shard("w", (NUMEL * 16,), torch.ones(NUMEL * 16))], OPTIMIZER: []}
    saver, share = Saver(tmp_path), NUMEL * 16 * 4
    for step in (1, 2):
        saver.begin(step, tensors, {}, {})
        saver.commit()
    end, own = os.pipe()
    before = memory("VmRSS")
    pid = os.fork()
    if pid == 0:
        os.close(own)
        os.read(end, 1)
        os._exit(0)
    try:
        tensors[MODEL][0].data.fill_(2)
        saver.begin(3, tensors, {}, {})
        saver.commit()
        assert memory("VmRSS", pid) <= before - share + SLACK
    finally:
        os.close(own)
        os.waitpid(pid, 0)
        os.close(end)


def test_a_disk_that_is_too_small_is_said_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"1000000000\.0 GB needed, [0-9.]+ GB free at"):
        make_directory(tmp_path / "step-000000001.tmp", 10**18)
    assert list(tmp_path.iterdir()) == []


def test_weights_are_fp32_and_no_state_has_the_name_of_a_weight(tmp_path: Path) -> None:
    half, full = Shard("w", (2,), torch.ones(2).half()), Shard("w", (2,), torch.ones(2))
    for tensors, words in (
        ({MODEL: [half], OPTIMIZER: []}, "weights are saved as fp32 or bf16, not torch.float16"),
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
