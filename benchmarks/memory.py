"""The memory forecast beside torch.cuda.max_memory_allocated: 20 settings of stage, precision, checkpointing, compile, optimizer.

    python benchmarks/memory.py [--json FILE] [--only WORD] [--seconds 240] [--at-once 4]

Each setting is a process of its own (vitds.trial) that makes two steps; it may run out of memory. On a GPU several run at
once, as long as what is forecast of them together, and a tenth more, is less than the GPU has; what does not fit runs alone,
last. Peaks are each process's own. The error is that of the
forecast's peak; "fits" is what `vitds plan` says of this device beside whether the steps ran. On a CPU the process' growth is
measured, which has more than tensors in it: the table there only shows that the benchmark runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from runner import ROOT, Candidate, Column, Failed, compare, report

from vitds.config import load_run_file
from vitds.planning.devices import Device, device, local_device
from vitds.planning.memory import Memory, memory
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
    parser.add_argument("--seconds", type=float, default=240, help="settings that would begin later are left out")
    parser.add_argument("--at-once", type=int, default=4 if torch.cuda.is_available() else 1, metavar="N")
    options = parser.parse_args()
    names = [name for name in SETTINGS if options.only in name]
    with TemporaryDirectory() as place, ThreadPoolExecutor(max(len(names), 1)) as pool:
        path, end = Path(place) / "run.json", time.monotonic() + options.seconds
        path.write_text(json.dumps(BASE))
        where = local_device() or device("cpu")
        room = Room(where.memory_bytes, options.at_once)
        needs = {name: forecast(path, overrides(name, options.set)) for name in names}
        order = sorted(names, key=lambda name: needs[name].total > where.memory_bytes)  # what is too large comes last
        turns = {}
        for name in order:
            work = partial(turn, path, overrides(name, options.set), needs[name], where, end)
            turns[name] = pool.submit(room.within, room.queue(needs[name].total), work)
        try:
            candidates = [Candidate(name, turns[name].result) for name in order]
            table = compare("memory", candidates, rounds=1, warmup=0, columns=COLUMNS, say=print)
        finally:
            room.close()
        report([table], options.json)


class Room:
    """A GPU's memory, lent to so many processes at once, first come, first served."""

    def __init__(self, has: int, at_once: int) -> None:
        self.has, self.at_once = has, at_once
        self.waiting: list[int] = []
        self.inside: list[int] = []
        self.changed, self.closed = threading.Condition(), False

    def queue(self, needed: int) -> int:
        """Take a place in the queue for so many bytes, and a tenth more; returns them."""
        self.waiting.append(needed := int(1.1 * needed))
        return needed

    def within(self, needed: int, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do the work once there is room for it.

        Raises:
            Failed: nothing is begun any more.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.next(needed))
            if self.closed:
                raise Failed("left out: the time was over")
            self.waiting.remove(needed)
            self.inside.append(needed)
            self.changed.notify_all()
        try:
            return work()
        finally:
            with self.changed:
                self.inside.remove(needed)
                self.changed.notify_all()

    def next(self, needed: int) -> bool:
        """Whether it is the first in the queue and there is room."""
        fits = len(self.inside) < self.at_once and sum(self.inside) + needed <= self.has
        return self.waiting[0] == needed and (fits or not self.inside)

    def close(self) -> None:
        """Begin nothing more."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()


def overrides(name: str, others: Sequence[str]) -> list[str]:
    """Of a setting."""
    micro, accumulation, more = SETTINGS[name]
    return [f"train_micro_batch_size_per_gpu={micro}", f"train_batch_size={micro * accumulation}", *more, *others]


def forecast(path: Path, sets: list[str]) -> Memory:
    """Of a setting, on this device."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return memory(workload_of(load_run_file(str(path), sets, world_size=1), kind), 1)


def turn(path: Path, sets: list[str], needed: Memory, where: Device, end: float) -> dict[str, Any]:
    """Measurement of one setting beside its forecast."""
    if time.monotonic() > end:
        raise Failed("left out: the time was over")
    command = [sys.executable, "-m", "vitds.trial", str(path), "1", *sets]
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
