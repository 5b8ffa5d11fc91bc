"""The memory forecast beside torch.cuda.max_memory_allocated: 20 settings of stage, precision, checkpointing, compile, optimizer.

    python benchmarks/memory.py [--json FILE] [--only WORD] [--seconds 140]

Each setting is a process of its own (vitds.trial) that makes two steps; it may run out of memory. The error is that of the
forecast's peak; "fits" is what `vitds plan` says of this device beside whether the steps ran. On a CPU the process' growth is
measured, which has more than tensors in it: the table there only shows that the benchmark runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from runner import ROOT, Candidate, Column, Failed, compare, report

from vitds.config import load_run_file
from vitds.planning.devices import device, local_device
from vitds.planning.memory import memory
from vitds.planning.workload import workload_of

GIB = 2**30
COLUMNS = (
    Column("forecast", "forecast GiB", ".2f", 1 / GIB), Column("measured", "measured GiB", ".2f", 1 / GIB),
    Column("error", "error %", "+.1f", 100), Column("total", "plan's total GiB", ".2f", 1 / GIB), Column("verdict", "verdict"),
)  # fmt: skip
BASE: dict[str, Any] = {
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "communication_data_type": "bf16",
    "zero_optimization": {"stage": 2},
    "data_types": {"grad_accum_dtype": "fp32"},
    "optimizer": {"type": "ModifiedAdafactor", "params": {"lr": 1e-4}},
    "vitds": {"model": {"variant": "ViT-L/16", "num_classes": 1000}, "data": {"train": {"source": "synthetic"}},
              "train": {"total_steps": 100}},
}  # fmt: skip
ADAM = 'optimizer={"type":"HalfPrecisionMomentumAdam","params":{"lr":1e-4}}'
TORCH = 'optimizer={"type":"AdamW","params":{"lr":1e-4,"torch_adam":true}}'
POLICY, COMPILE, STAGE = "vitds.train.activation_checkpointing=", "vitds.train.compile=true", "zero_optimization.stage="
G14, H14 = "vitds.model.variant=ViT-G/14", "vitds.model.variant=ViT-H/14"
FP32 = "bf16.enabled=false"
SUMS = "data_types.grad_accum_dtype=bf16"
SETTINGS: dict[str, tuple[int, int, list[str]]] = {
    # name: micro batch, accumulation, overrides
    "L/16 z2": (64, 1, []),
    "L/16 z2, 2 micro": (64, 2, []),
    "L/16 z2 full": (256, 1, [POLICY + "full"]),
    "L/16 z2 selective": (128, 1, [POLICY + "selective"]),
    "L/16 z2 compiled": (64, 1, [COMPILE]),
    "L/16 z2 compiled selective": (128, 1, [POLICY + "selective", COMPILE]),
    "L/16 z1": (64, 2, [STAGE + "1"]),
    "L/16 z1 bf16 sums": (64, 2, [STAGE + "1", SUMS]),
    "L/16 z3": (64, 1, [STAGE + "3"]),
    "L/16 z0": (64, 1, [STAGE + "0", SUMS]),
    "L/16 fp32": (32, 1, [FP32]),
    "L/16 half-precision Adam": (64, 1, [ADAM]),
    "L/16 AdamW": (64, 1, [TORCH]),
    "L/16 21,843 classes": (128, 1, ["vitds.model.num_classes=21843"]),
    "L/16 384 px": (16, 1, ["vitds.model.image_size=384"]),
    "H/14 every:2": (64, 1, [H14, POLICY + "every:2"]),
    "H/14 z2 compiled": (48, 2, [H14, COMPILE]),
    "G/14 compiled": (48, 1, [G14, COMPILE]),
    "G/14 full": (256, 1, [G14, POLICY + "full"]),
    "G/14 far too large": (4096, 1, [G14]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--only", default="", metavar="WORD", help="settings with this in their name")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="in all settings")
    parser.add_argument("--seconds", type=float, default=140, help="settings that would begin later are left out")
    options = parser.parse_args()
    with TemporaryDirectory() as place:
        table = compare(
            "memory",
            list(candidates(options, Path(place) / "run.json")),
            rounds=1,
            warmup=0,
            columns=COLUMNS,
            say=print,
        )
        report([table], options.json)


def candidates(options: argparse.Namespace, path: Path) -> Iterator[Candidate]:
    """One for each setting."""
    path.write_text(json.dumps(BASE))
    end = time.monotonic() + options.seconds
    for name, (micro, accumulation, more) in SETTINGS.items():
        if options.only not in name:
            continue
        batch = [f"train_micro_batch_size_per_gpu={micro}", f"train_batch_size={micro * accumulation}"]
        yield Candidate(name, lambda words=(*batch, *more, *options.set): turn(path, list(words), end))


def turn(path: Path, overrides: list[str], end: float) -> dict[str, Any]:
    """Forecast and measurement of one setting."""
    if time.monotonic() > end:
        raise Failed("left out: the time was over")
    where = local_device() or device("cpu")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    needed = memory(workload_of(load_run_file(str(path), overrides, world_size=1), kind), 1)
    command = [sys.executable, "-m", "vitds.trial", str(path), "1", *overrides]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=max(60.0, end - time.monotonic())
    )
    found = (
        json.loads(done.stdout.strip().splitlines()[-1])
        if done.returncode == 0
        else {"failed": "it ended without a word"}
    )
    fits = needed.total <= where.memory_bytes
    figures: dict[str, Any] = {"forecast": needed.peak, "total": needed.total}
    if "failed" in found:
        if fits or "out of memory" not in found["failed"]:
            raise Failed(
                f"forecast {needed.peak / GIB:.2f} GiB, {'FALSELY fits' if fits else 'does not fit'}; {found['failed'][:90]}"
            )
        return figures | {"verdict": "rightly does not fit"}
    measured = found["peak_bytes"]
    verdict = "rightly fits" if fits else "fits, though not forecast"
    return figures | {"measured": measured, "error": needed.peak / measured - 1, "verdict": verdict}


if __name__ == "__main__":
    main()
