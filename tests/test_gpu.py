"""What was only seen on CPUs, on a GPU: the recorded-gradient matrix with fp16, and training with resume in every cell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import ROOT, deepspeed, train
from tests.zero import recorded, trained
from tests.zero.test_recorded import assemble, worst

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.launch,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_every_cell_matches_the_equations_on_a_gpu(tmp_path):
    done = deepspeed(1, Path(recorded.__file__), tmp_path, DS_ACCELERATOR="cuda", VITDS_TORTURE="1")
    assert done.returncode == 0, done.stdout[-3000:]
    runs, facts = assemble([load_file(tmp_path / "rank0.safetensors")])
    found = {run: (facts[run]["wrapper"], *worst(runs, run, 1)) for run in runs if not run.startswith("broken")}
    print("\n".join(f"{run:50} {row}" for run, row in found.items()))
    assert any("fp16" in run for run in found)
    assert all(decided < 5e-6 and doubtful < 2e-2 for _, decided, doubtful in found.values())


def test_training_and_resuming_in_every_cell_on_a_gpu(tmp_path):
    done = deepspeed(1, Path(trained.__file__), tmp_path, DS_ACCELERATOR="cuda", VITDS_TORTURE="1")
    assert done.returncode == 0, done.stdout[-3000:]
    facts = json.loads((tmp_path / "rank0.json").read_text())
    for run, fact in facts.items():
        for one, other in zip(fact["resumed_losses"], fact["losses"][trained.STEPS // 2 :], strict=True):
            assert one == pytest.approx(other, rel=1e-3), run


def test_the_digits_are_learnt_on_a_gpu_compiled(tmp_path):
    done = train(
        1, ROOT / "ds_configs" / "digits.json", tmp_path / "run", "vitds.train.compile=true", "vitds.train.total_steps=400",
        "scheduler.params={\"warmup_steps\":50}", DS_ACCELERATOR="cuda",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "perf/mfu" in (tmp_path / "run" / "metrics.jsonl").read_text()
