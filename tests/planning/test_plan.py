"""`vitds plan`: its verdict, what it says would fit or be faster, its exit codes; and the trainer that refuses what cannot fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.launching import ROOT, TRAINER, ranks, train_alone, words
from vitds.cli import main
from vitds.config import load_run_file
from vitds.errors import UserError
from vitds.planning.changes import Place, largest_micro_batch
from vitds.planning.devices import GIB, device
from vitds.planning.memory import memory
from vitds.planning.refusal import refuse_what_cannot_fit, room_here
from vitds.planning.speed import step_time
from vitds.planning.workload import Workload, workload_of

G14 = str(ROOT / "ds_configs" / "gigantic_G14_zero2.json")
LARGE = ("train_batch_size=4096", "train_micro_batch_size_per_gpu=1024")


def gigantic(*overrides: str, gpus: int = 1) -> Workload:
    return workload_of(load_run_file(G14, list(overrides), world_size=gpus))


def plan(capsys: pytest.CaptureFixture[str], *words: str, overrides: tuple[str, ...] = ()) -> tuple[int, str]:
    sets = [word for text in overrides for word in ("--set", text)]
    code = main(["plan", "--config", G14, *sets, *words])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_it_fits_and_says_what_is_faster(capsys: pytest.CaptureFixture[str]):
    code, text = plan(capsys, "--device", "h200", "--gpus", "8", "--json")
    found = json.loads(text)
    assert code == 0 and found["fits"]
    assert found["memory"]["total"] <= found["device"]["memory_bytes"]
    assert found["changes"] and all(
        c["images_per_second"] > found["step"]["images_per_second"] for c in found["changes"]
    )
    assert [c["images_per_second"] for c in found["changes"]] == sorted(
        (c["images_per_second"] for c in found["changes"]), reverse=True
    )
    assert found["steps"] == 1_000_000 and found["gpu_hours"] == pytest.approx(
        1e6 * found["step"]["seconds"] * 8 / 3600
    )


def test_what_is_said_to_fit_does(capsys: pytest.CaptureFixture[str]):
    """Each change, given as it was printed, is accepted and makes the same plan fit."""
    code, text = plan(capsys, "--device", "h100", "--json", overrides=LARGE)
    found = json.loads(text)
    assert code == 1 and not found["fits"] and len(found["changes"]) >= 2
    for change in found["changes"]:
        workload = gigantic(*LARGE, *change["set"])
        assert workload.images == 4096
        assert memory(workload, 1).total == change["total"] <= device("h100").memory_bytes


def test_the_page_for_people(capsys: pytest.CaptureFixture[str]):
    code, text = plan(capsys, "--device", "h100", overrides=LARGE)
    assert code == 1
    for said in ("does not fit: ", "GiB too much", "what would make it fit", "--set train_micro_batch_size_per_gpu=", "images/s",
                  "activations: mlp", "masters: fp32", "GPU-hours", "a checkpoint is 11.6 GB", "not calibrated"):  # fmt: skip
        assert said in text, f"{said}\n{text}"
    assert plan(capsys, "--device", "h100", "--gpus", "8")[0] == 0


def test_a_small_run_s_page(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--config", "ds_configs/digits.json", "--device", "h100", "--mfu", "1e-6"]) == 0
    text = capsys.readouterr().out
    assert "the largest micro batch that fits: 65,536 or more" in text
    assert " 0.0 h" not in text and " 0 GPU-hours" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "h20"], "did you mean 'h200'?"),
        ([], "this machine has no GPU that is known; say which is meant (h100, "),
        (["--device", "h100", "--gpus", "3"], "train_batch_size: 16384 does not divide over 3 ranks"),
    ],
)
def test_input_that_is_wrong(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    code, text = plan(capsys, *words)
    assert code == 2 and message in text


def test_plan_without_a_run_file(capsys: pytest.CaptureFixture[str]):
    assert main(["plan"]) == 2
    assert "--config: missing" in capsys.readouterr().err


def test_the_largest_micro_batch_is_the_largest():
    workload, h200 = gigantic(), device("h200")
    place = Place(1, h200, h200.machine())
    largest = largest_micro_batch(workload, place)
    assert place.holds(memory(replace(workload, micro_batch=largest), 1))
    assert not place.holds(memory(replace(workload, micro_batch=largest + 1), 1))


def test_memory_and_time_move_as_they_must():
    workload, h200 = gigantic("train_micro_batch_size_per_gpu=64"), device("h200")
    by_policy = [memory(workload.with_policy(name), 1).peak for name in ("none", "every:4", "every:2", "full")]
    assert by_policy == sorted(by_policy, reverse=True)
    by_stage = [memory(replace(workload, job=workload.job.at_stage(stage)), 8).moments["step"] for stage in (1, 2, 3)]
    assert by_stage[0] > by_stage[1] > by_stage[2]
    assert memory(replace(workload, ema=True), 1).peak - memory(workload, 1).peak == pytest.approx(
        4 * workload.job.trained, rel=1e-3
    )
    fast, slow = (step_time(workload.with_policy(name), 1, h200) for name in ("none", "full"))
    assert 1.25 < slow.seconds / fast.seconds < 1.36  # one forward pass in three
    told = step_time(workload.with_policy("none"), 1, h200, mfu=0.5)
    assert 0.4 < told.mfu < 0.5
    assert step_time(workload, 8, h200).images == 8 * workload.images


def test_states_of_the_paper():
    """recipe: G/14's second moments are 8,690,098 numbers, its momentum 2 bytes a parameter."""
    states = {(p.kind, p.what): p.bytes for p in memory(gigantic(), 1).parts}
    assert states["weights", ""] == pytest.approx(2 * 1_930_404_761, rel=1e-6)
    assert states["masters", "fp32"] == pytest.approx(4 * 1_930_404_761, rel=1e-6)
    assert states["optimizer state", "ModifiedAdafactor"] == pytest.approx(2 * 1_930_404_761 + 4 * 8_690_098, rel=1e-6)


def test_device_names():
    assert device("H200").memory_bytes == 139 * GIB
    assert 0 < device("cpu", 2).memory_bytes < device("cpu").memory_bytes * 0.6
    with pytest.raises(UserError, match="a100-80"):
        device("a100")


def huge(tmp_path: Path) -> Path:
    """ViT-e/14 in fp32 with a million images a step: more than any host has."""
    given = json.loads((ROOT / "ds_configs" / "digits.json").read_text())
    given |= {"bf16": {"enabled": False}, "train_batch_size": 2**20, "train_micro_batch_size_per_gpu": 2**20}
    given["vitds"] |= {
        "model": {"variant": "ViT-e/14", "num_classes": 1000},
        "data": {"train": {"source": "synthetic"}},
    }
    path = tmp_path / "huge.json"
    path.write_text(json.dumps(given))
    return path


def test_a_rank_is_judged_by_the_device_that_it_computes_on(monkeypatch: pytest.MonkeyPatch):
    """Not by a GPU that DS_ACCELERATOR=cpu leaves alone, nor by a smaller one that is another rank's or nobody's."""
    memories = [2 * GIB, 80 * GIB]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(memories))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda at: SimpleNamespace(total_memory=memories[torch.device(at).index])
    )
    assert room_here()[0] == "cpu"
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert room_here()[:2] == ("cuda", 80 * GIB)


def test_a_bucket_larger_than_the_model_is_no_reason_to_refuse_on_a_cpu():
    """DeepSpeed's own size, twice: pages that nothing is written to take no memory of a host."""
    run = load_run_file(
        str(ROOT / "ds_configs" / "digits.json"),
        ["zero_optimization.reduce_bucket_size=500000000", "zero_optimization.overlap_comm=true"],
        world_size=8,
    )
    refuse_what_cannot_fit(workload_of(run, "cpu"), 8, GIB // 4, "this host")
    with pytest.raises(UserError, match="buckets: buffer"):
        refuse_what_cannot_fit(workload_of(run, "cuda"), 8, GIB // 4, "the GPU")


def test_the_trainer_refuses_what_cannot_fit(tmp_path: Path):
    done = train_alone(1, huge(tmp_path), tmp_path / "run")
    assert done.returncode == 2, done.stdout
    assert "this run cannot fit: a rank needs" in done.stdout and "--ignore-forecast" in done.stdout
    assert "what would fit" in done.stdout or "no single change" in done.stdout
    assert not (tmp_path / "run").exists()


def test_the_refusal_can_be_overridden(tmp_path: Path):
    """Another mistake, which is looked at later, is what ends it then: nothing so large is made in a test."""
    (tmp_path / "file").write_text("")
    done = ranks(1, TRAINER, *words(huge(tmp_path), tmp_path / "file", ()), "--ignore-forecast")
    assert done.returncode != 0
    assert "cannot fit" not in done.stdout and str(tmp_path / "file") in done.stdout, done.stdout
