"""Every row and picture read back from where it was written; speeds from a clock that is set by hand."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitds.errors import UserError
from vitds.metrics import (
    MonitorSections,
    Recorder,
    Speedometer,
    Throughput,
    block_norms,
    closing_lines,
    device_peak,
    group_by_block,
    mfu,
    monitor_sections,
    named_peak,
    peak_memory_gib,
    read_metrics,
)
from vitds.metrics.progress_line import ProgressLine

TENSORBOARD = monitor_sections({"tensorboard": {"enabled": True}})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def record(directory: Path, steps: range, monitors: MonitorSections = TENSORBOARD, **more: Any) -> None:
    """A life of a run: of every step the loss 1/step, from one less than the first on."""
    recorder = Recorder(directory, monitors, 10, 64, first_step=steps.start - 1, stream=io.StringIO(), **more)
    for step in steps:
        recorder.record(step, {"train/loss": torch.tensor(1 / step), "train/lr": np.float64(step)})
    recorder.close()


def events(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def test_rows_are_strict_json(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/lo')
    recorder = Recorder(tmp_path, MonitorSections(), 10, 64, stream=io.StringIO())
    recorder.record(1, {"train/loss": float("nan"), "train/grad_norm": torch.tensor(torch.inf), "train/lr": 1e-3})
    recorder.record(2, {"train/loss": 2})
    recorder.record(2, {"eval/top1": 0.5})
    recorder.record(1, {"train/loss": 1.5})

    def refuse(word: str) -> None:
        pytest.fail(f"{word} is no JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()[1:]
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert rows[0] == {"step": 1, "train/loss": None, "train/grad_norm": None, "train/lr": 1e-3}
    assert rows[1:] == [{"step": 2, "train/loss": 2}, {"step": 2, "eval/top1": 0.5}, {"step": 1, "train/loss": 1.5}]
    assert read_metrics(tmp_path) == [
        {"step": 1, "train/loss": 1.5, "train/grad_norm": None, "train/lr": 1e-3},
        {"step": 2, "train/loss": 2, "eval/top1": 0.5},
    ]


def test_tensorboard_after_a_resume(tmp_path: Path) -> None:
    """Killed after step 6, resumed from the checkpoint of step 4: no step twice, none of the dead life's left."""
    record(tmp_path, range(1, 7))
    record(tmp_path, range(5, 6))
    scalars = events(tmp_path / "tensorboard").Scalars("train/loss")
    assert [event.step for event in scalars] == [1, 2, 3, 4, 5]
    assert [event.value for event in scalars] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_what_is_recorded_is_on_disk_at_once(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, TENSORBOARD, 10, 64, stream=io.StringIO())
    for step in (1, 2, 3):
        recorder.record(step, {"train/loss": 1.0})
        assert len(events(tmp_path / "tensorboard").Scalars("train/loss")) == step
        assert len(read_metrics(tmp_path)) == step
    recorder.close()


def test_run_file_and_first_batch_in_tensorboard(tmp_path: Path) -> None:
    uint8 = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures = []
    for name, images in {"uint8": uint8, "float": uint8.float() / 127.5 - 1}.items():
        (tmp_path / name).mkdir()
        recorder = Recorder(tmp_path / name, TENSORBOARD, 10, 64, run_file={"vitds": {"a": "é"}}, stream=io.StringIO())
        recorder.first_batch(images)
        recorder.close()
        read = events(tmp_path / name / "tensorboard")
        [text] = read.Tensors("run_file/text_summary")
        assert '"a": "é"' in text.tensor_proto.string_val[0].decode()
        [image] = read.Images("first_batch")
        pictures.append(np.asarray(Image.open(io.BytesIO(image.encoded_image_string))))
    np.testing.assert_array_equal(*pictures)
    np.testing.assert_array_equal(pictures[0][:8, :8], uint8[0].permute(1, 2, 0))
    assert pictures[0].shape == (16, 64, 3), "one picture, eight in a row"


def test_csv(tmp_path: Path) -> None:
    section = {"csv_monitor": {"enabled": True, "output_path": f"{tmp_path}/tables", "job_name": "a"}}
    record(tmp_path, range(1, 3), monitor_sections(section))
    record(tmp_path, range(3, 4), monitor_sections(section))
    with open(tmp_path / "tables/a/train_lr.csv") as file:
        assert list(csv.reader(file)) == [["step", "train/lr"], ["1", "1.0"], ["2", "2.0"], ["3", "3.0"]]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_that_is_not_installed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"wandb\.enabled: .*pip install wandb"):
        Recorder(tmp_path, monitor_sections({"wandb": {"enabled": True}}), 10, 64)


def test_a_monitor_that_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("tensorboard", "csv_monitor"):
        with pytest.raises(UserError, match=r"cannot write to .*file.*output_path"):
            Recorder(tmp_path, monitor_sections({name: {"enabled": True, "output_path": f"{tmp_path}/file/x"}}), 10, 64)


@pytest.mark.parametrize(
    ("run_file", "words"),
    [
        ({"tensorboard": {"enable": True}}, "tensorboard.enable: unknown key (did you mean 'enabled'?)"),
        ({"wandb": {"enabled": "yes"}}, "wandb.enabled: expected true or false, found 'yes'"),
        ({"csv_monitor": {"enabled": True, "jobname": "a"}}, "did you mean 'job_name'"),
    ],
)
def test_mistakes_in_the_sections(run_file: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as raised:
        monitor_sections(run_file)
    assert words in str(raised.value)


def test_only_rank_0_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    record(tmp_path, range(1, 3), run_file={})
    assert os.listdir(tmp_path) == []


def test_the_progress_line() -> None:
    row = {"train/loss": 2.30259, "train/lr": 8e-4, "train/grad_norm": 1.23456, "perf/images_per_second": 1234.5}
    log, terminal = io.StringIO(), Terminal()
    for stream in (log, terminal):
        progress = ProgressLine(2000, 64, stream)
        progress.show(500, row)
        progress.show(501, {"train/loss": 2.0})
        progress.show(501, {"eval/top1": 0.98765, "eval/top5": 1.0})
        progress.show(502, {"train/grad_norm/blocks.0": 1.0})
        progress.close()
    first = "step  500/2000  25%  loss 2.3026  lr 8.00e-04  grad norm 1.23  1,234 images/s  ETA 0:01:18"
    second = "step  501/2000  25%  loss 2.0000"
    third = "step 501: eval/top1 0.9877, eval/top5 1"
    assert log.getvalue() == f"{first}\n{second}\n{third}\n"
    assert terminal.getvalue() == f"\r\x1b[K{first}\r\x1b[K{second}\n{third}\n"


def test_throughput_leaves_out_evaluation_and_saving() -> None:
    now = 0.0

    def pass_time(seconds: float) -> None:
        nonlocal now
        now += seconds

    throughput = Throughput(lambda: now)
    pass_time(100)
    throughput.restart()
    assert throughput.rates() == {}
    pass_time(99)
    throughput.count(64)  # the first step, which compiles
    for _ in range(2):
        for _ in range(4):
            with throughput.waiting():
                pass_time(0.5)
            pass_time(1.5)
            throughput.count(64)
        with throughput.paused():
            pass_time(50)
        assert throughput.rates() == {"perf/images_per_second": 32.0, "perf/data_wait": 0.25}


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "fp16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156e12),
        ("NVIDIA A10", "bf16", 125e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA A100-SXM4-80GB", "fp32", None),
        ("Unheard-of 1", "bf16", None),
    ],
)
def test_peaks(device: str, precision: str, peak: float | None) -> None:
    found = named_peak(device, precision)
    assert (found and found.flops) == peak


def test_mfu_and_the_peak_a_user_gives() -> None:
    cpu = torch.device("cpu")
    assert device_peak(cpu, "bf16") is None
    peak = device_peak(cpu, "fp32", 2.0)
    assert peak is not None
    assert peak.flops == 2e12
    assert "peak_tflops" in peak.name
    # 5 GFLOP forward, 15 with the backward pass, 200 images/s: 3 of 2 × 4 TFLOP/s.
    assert mfu(200, 5e9, 4, peak) == pytest.approx(3 / 8)


@dataclass
class Settings:
    peak_tflops: float | None
    tf32: bool = False


@pytest.mark.parametrize("peak", [None, 2.0])
def test_the_speedometer_s_row(peak: float | None) -> None:
    speedometer = Speedometer(5e9, 2, torch.float32, torch.device("cpu"), Settings(peak))
    assert set(speedometer.row()) == {"perf/peak_memory_gib"}, "nothing counted yet"
    speedometer.count(64)
    assert set(speedometer.row()) == {"perf/peak_memory_gib"}, "the first step compiles"
    speedometer.count(64)
    row = speedometer.row()
    assert ("perf/mfu" in row) == (peak is not None)
    if peak is not None:
        assert row["perf/mfu"] == pytest.approx(15e9 * row["perf/images_per_second"] / 4e12)


def test_peak_memory_is_this_process_s_high_water_mark() -> None:
    before = peak_memory_gib(torch.device("cpu"))
    more = before + 0.1  # than the process has ever held, whatever it has freed since
    torch.ones(int(more * 2**28))  # fp32, freed at once
    after = peak_memory_gib(torch.device("cpu"))
    assert 0.05 < before < more < after < more + before + 0.1


def test_blocks() -> None:
    names = {
        "blocks.12.attn.qkv.weight": "blocks.12",
        "patch_embed.proj.bias": "patch_embed",
        "pos_embed": "pos_embed",
        "cls_token": "cls_token",
        "norm.weight": "norm",
        "attn_pool.mlp.fc1.weight": "attn_pool",
        "head.bias": "head",
    }
    assert {name: group_by_block(name) for name in names} == names


@dataclass
class Sums:
    gradient: float
    weight: float
    update: float
    numel: int


def test_block_norms() -> None:
    """Norms add up in squares, and the update's is a mean over the block's elements."""
    row = block_norms({"blocks.0.a": Sums(9, 1, 8, 3), "blocks.0.b": Sums(16, 3, 1, 6), "head.bias": Sums(0, 4, 4, 1)})
    assert row == {
        "train/grad_norm/blocks.0": 5,
        "train/param_norm/blocks.0": 2,
        "train/update_rms/blocks.0": 1,
        "train/grad_norm/head": 0,
        "train/param_norm/head": 2,
        "train/update_rms/head": 2,
    }


def test_closing_lines_name_what_is_there(tmp_path: Path) -> None:
    for name in ("step-000000010", "step-000000020", "step-000000030.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    for name in ("step-000000010", "step-000000020"):
        (tmp_path / "checkpoints" / name / "manifest.json").touch()
    text = closing_lines(tmp_path, TENSORBOARD)
    assert f"--logdir {tmp_path}/tensorboard" in text
    assert f"{tmp_path}/metrics.jsonl" in text
    assert f"from_pretrained('{tmp_path}/checkpoints/step-000000020')" in text
    bare = closing_lines(tmp_path / "empty", MonitorSections())
    assert "tensorboard" not in bare
    assert "checkpoints" not in bare
