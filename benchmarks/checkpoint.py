"""Save and load of one engine's state: ours beside DeepSpeed's own, and a plain write and read of the same bytes.

    deepspeed --num_gpus 2 benchmarks/checkpoint.py [--variant ViT-B/16] [--stage 2] [--rounds 5] [--directory /tmp]

All candidates take turns within each round, so that a noisy machine disturbs them alike; medians are printed, the first
round is not counted. Every file is synced when a save ends (DeepSpeed does not do so: its line says what it takes
without and with) and dropped from the page cache before a load. Ratios are of GB/s, to the plain file's. Memory is the
most by which a rank's resident memory rose above what it was before, over all rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from runner import Candidate, Column, Row, Table, report, tabulate

from vitds import dist
from vitds.checkpoint import Saved, Saver, open_checkpoint
from vitds.checkpoint.format import MODEL, OPTIMIZER
from vitds.models import ModelSection, ViTForImageClassification, build_config
from vitds.optim.groups import build_groups
from vitds.zero import TrainingEngine, init_distributed

COLUMNS = (
    Column("seconds", "s", ".3f"), Column("bytes", "GB", ".2f", 1e-9), Column("bytes/s", "GB/s", ".2f", 1e-9),
    Column("grown", "+MB/rank", ".0f", 1e-6),
)  # fmt: skip
BLOCK = 16 * 2**20
STALL = "vitds save, background: training stalls"
STATE = {
    "position": 1, "images_seen": 1, "evaluated": 0, "world_size": 1, "zero_stage": 0, "skipped": [], "losses": [],
    "stream": {"seed": 0, "global_batch": 1, "rates": {}}, "schedule": {"type": "constant", "total_steps": 1, "params": {}},
    "optimizer": {"type": ""}, "counters": {"optimizer": {"updates": 1}, "loss_scale": {}}, "evaluation": {}, "versions": {},
}  # fmt: skip


def build_engine(variant: str, optimizer: str, stage: int) -> TrainingEngine:
    """An engine in bf16 after one step, so that the optimizer has its state."""
    config = build_config(ModelSection(variant=variant, num_classes=1000))
    with torch.device("meta"):
        model = ViTForImageClassification(config)
    groups = build_groups(
        model.shapes, lr=1e-4, weight_decay=0.03, head_weight_decay=None, decay_patterns=model.decay_patterns()
    )
    section = {
        "train_batch_size": dist.world_size(), "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": stage},
    }  # fmt: skip
    engine = TrainingEngine(model, groups, {"type": optimizer, "params": {"lr": 1e-4}}, section, 1)
    images = torch.randn(1, 3, config.image_size, config.image_size, device=engine.device, dtype=torch.bfloat16)
    engine.backward(engine(images, labels=torch.zeros(1, dtype=torch.long, device=engine.device)).loss)
    engine.step()
    return engine


class Bench:
    """The candidates, and what each took."""

    def __init__(self, engine: TrainingEngine, directory: Path) -> None:
        self.engine, self.directory = engine, directory
        self.tensors = {MODEL: engine.master_shards(), OPTIMIZER: engine.state_shards()}
        self.savers = [Saver(directory / "ours", background=background) for background in (True, False)]
        self.seconds: dict[str, list[float]] = {}
        self.growth: dict[str, int] = {}
        self.nbytes: dict[str, int] = {}

    def plain(self) -> None:
        """As many bytes as the largest share of a checkpoint, from each rank."""
        path, share = self.directory / f"plain-{dist.rank()}", self.savers[0].plan(self.tensors)
        block = bytearray(os.urandom(BLOCK))

        def write() -> None:
            for begin in range(0, share, BLOCK):
                file.write(memoryview(block)[: share - begin])
            os.fsync(file.fileno())

        def read() -> None:
            while file.readinto(block):
                pass

        with open(path, "w+b", buffering=0) as file:
            self._time("plain file: write + fsync", write, share * dist.world_size())
            sync(self.directory, forget=True)
            file.seek(0)
            self._time("plain file: read", read, share * dist.world_size())
        path.unlink()

    def ours(self, saver: Saver, number: int) -> None:
        """Save, and load what was saved."""
        saved: list[Saved] = []

        def save() -> None:
            saver.begin(number, self.tensors, {**STATE, "step": number}, {})
            while saver.busy:
                time.sleep(0.002)  # here a run would train
            saved.append(saver.commit())

        def load(verify: str) -> None:
            open_checkpoint(saved[0].path, verify).read_into(self.tensors)
            self.engine.refresh_weights()

        name = f"vitds save, {'background' if saver.background else 'synchronous'}"
        self._time(name, save)
        path, self.nbytes[name] = saved[0].path, saved[0].bytes
        assert saved[0].background == saver.background, saved[0].note
        if saver.background:
            self.seconds.setdefault(STALL, []).append(saved[0].stall_seconds)
            self.nbytes[STALL] = saved[0].bytes
            for verify in ("full", "size"):
                sync(path, forget=True)
                self._time(f"vitds load, verify {verify}", partial(load, verify), saved[0].bytes)
        sync(path, delete=True)

    def deepspeeds(self, number: int) -> None:
        """The same engine's own save and load."""
        path, engine = self.directory / "deepspeed", self.engine.deepspeed

        def save(tag: str, then: Callable[[Path], None]) -> None:
            engine.save_checkpoint(str(path), tag=tag)
            then(path)

        self._time("DeepSpeed save, not synced", partial(save, f"{number}", lambda path: None))
        nbytes = sum(file.stat().st_size for file in (path / f"{number}").rglob("*"))
        sync(path)
        self._time("DeepSpeed save + fsync", partial(save, f"synced{number}", sync), nbytes)
        self.nbytes["DeepSpeed save, not synced"] = nbytes
        sync(path, forget=True)
        self._time("DeepSpeed load", lambda: engine.load_checkpoint(str(path), tag=f"{number}"), nbytes)
        sync(path, delete=True)

    def _time(self, name: str, action: Callable[[], object], nbytes: int = 0) -> None:
        """Time from when all ranks begin until the last ends, and the largest growth of a rank's memory."""
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
        before, began = memory("VmRSS"), time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            action()
        taken, grown = time.perf_counter() - began, memory("VmHWM") - before
        both = dist.all_objects((taken, grown))
        self.growth[name] = max(self.growth.get(name, 0), *(grown for _, grown in both))
        self.seconds.setdefault(name, []).append(max(taken for taken, _ in both))
        self.nbytes.setdefault(name, nbytes)

    def table(self, title: str) -> Table:
        """One row per candidate; the first round is not counted."""
        rows, candidates = [], []
        for name, seconds in self.seconds.items():
            plain = "plain file: read" if "load" in name or "read" in name else "plain file: write + fsync"
            facts = {"grown": self.growth.get(name), "bytes": float(self.nbytes[name])}
            rounds = [{"seconds": taken, "bytes/s": self.nbytes[name] / taken} for taken in seconds[1:]]
            rows.append(Row(name, rounds))
            candidates.append(Candidate(name, dict, plain if plain != name else None, facts=facts))
        return tabulate(title, rows, candidates, "bytes/s", COLUMNS)


def memory(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


def sync(directory: Path, *, forget: bool = False, delete: bool = False) -> None:
    """All files below are on the disk; and, if asked, no longer in the page cache, or gone."""
    dist.barrier()
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and not delete):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            if forget:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if delete and dist.is_main():
        shutil.rmtree(directory)
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"variant": "ViT-B/16", "optimizer": "HalfPrecisionMomentumAdam", "stage": 2, "rounds": 5}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", default=default, type=type(default))
    parser.add_argument("--directory", help="where to write; default: the system's temporary directory")
    parser.add_argument("--json", default="benchmarks/checkpoint.json")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    init_distributed()
    engine = build_engine(arguments.variant, arguments.optimizer, arguments.stage)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as own:
        bench = Bench(engine, Path(dist.broadcast_object(own)))
        for number in range(arguments.rounds + 1):
            bench.plain()
            for saver in bench.savers:
                bench.ours(saver, number)
            bench.deepspeeds(number)
    what = f"{arguments.variant}, {arguments.optimizer}, bf16, ZeRO-{arguments.stage}"
    if dist.is_main():
        title = f"checkpoint: {what}, {dist.world_size()} ranks on {engine.device.type}"
        report([bench.table(title)], arguments.json, engine.device)
    dist.leave(0)


if __name__ == "__main__":
    main()
