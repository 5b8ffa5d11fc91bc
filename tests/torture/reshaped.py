"""Save in one cell, go on in another; run as a script under `deepspeed`, one launch per world size, all at one time.

    reshaped.py ROOT

ROOT/plan-<ranks>.json holds what this world size has to do: the cells of its unbroken runs, which save on the way, and
[source, cell, fault] for every run that goes on from a save, of this launch or of another that runs beside it. A cell
is "<ranks>r <precision> z<stage> <optimizer>". Rank 0 leaves its findings in ROOT/found-<ranks>.json, and parameters
in ROOT/found-<ranks>.safetensors under "<run>|<parameter>".
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from tests.zero import trained
from tests.zero.small import ADAM, DATA, SCHEDULE, build_engine, one_step
from vitds import dist
from vitds.checkpoint import CheckpointSection
from vitds.checkpoint.ema import EmaSection
from vitds.checkpoint.save import Saver
from vitds.checkpoint.state import RunState
from vitds.data import TrainLoader, build_sources
from vitds.layout import Shard
from vitds.models import VitdsImageProcessor
from vitds.run_directory import RunDirectory
from vitds.schedules import build_schedule
from vitds.zero import init_distributed

SAVED_AT, STEPS, BATCH = 6, 26, 12
ACCUMULATION = {1: 3, 2: 2, 3: 1}
"""By world size: micro batches of 4, 3 and 4 images."""
WIDTH = 10
"""With 2 heads of 5, so that no split over 2 or 3 ranks falls between rows."""
MODEL = replace(trained.MODEL, width=WIDTH, depth=1, mlp_dim=14, patch_size=4)
OPTIMIZERS: dict[str, dict[str, Any]] = {"adafactor": trained.ADAFACTOR, "adam": ADAM}
MIXUP = {"adafactor": 0.0, "adam": 0.5}
SHIFTED = "blocks.0.attn.qkv.weight"
DESCRIBES_THE_SAVER = ("world_size", "zero_stage")
"""Keys of training_state.json that say where it was saved; all others must survive."""


class Cell(NamedTuple):
    """Where a run takes place."""

    ranks: int
    precision: str
    stage: int
    optimizer: str

    def __str__(self) -> str:
        return f"{self.ranks}r {self.precision} z{self.stage} {self.optimizer}"

    @classmethod
    def of(cls, text: str) -> Cell:
        """The cell of a name."""
        ranks, precision, stage, optimizer = text.split()
        return cls(int(ranks[:-1]), precision, int(stage[1:]), optimizer)


class Run:
    """One engine with its state and stream, from the newest checkpoint in a directory or from the start."""

    def __init__(self, cell: Cell, directory: Path) -> None:
        optimizer, self.accumulation = OPTIMIZERS[cell.optimizer], ACCUMULATION[cell.ranks]
        self.engine, self._model = build_engine(
            f"{cell.precision} z{cell.stage}",
            optimizer,
            model=MODEL,
            global_batch=BATCH,
            accumulation=self.accumulation,
        )
        self.schedule = build_schedule(SCHEDULE, total_steps=STEPS, global_batch=BATCH)
        self._resolved = {"vitds": {"train": {"seed": 0}}, "optimizer": optimizer, "train_batch_size": BATCH}
        self._state = self._state_in(directory)
        self.progress, _ = self._state.restore()
        data = replace(DATA, mixup=MIXUP[cell.optimizer])
        source = build_sources(data, 10).train
        self.loader = TrainLoader(
            source, data, image_size=8, num_classes=10, seed=0, global_batch=BATCH, rank=dist.rank(), world_size=cell.ranks,
            micro_batch=BATCH // cell.ranks // self.accumulation, position=self.progress.position,
        )  # fmt: skip
        self.stream: dict[int, str] = {}
        """Position -> digest of the image's and the label's bytes, as this rank's model saw them."""

    def _state_in(self, directory: Path) -> RunState:
        """The run's state, with `directory` to save to and to restore from; in many files and many buckets."""
        processor, section = VitdsImageProcessor(8, 8), CheckpointSection()
        run_directory = RunDirectory(directory)
        state = RunState(
            self.engine, self._model, self.schedule, self._resolved, processor, run_directory, section, EmaSection(0.9)
        )
        state.saver = Saver(run_directory.checkpoints, bucket_bytes=3000, file_bytes=6000, min_file_bytes=1000)
        return state

    def save(self, directory: Path) -> Path:
        """A committed checkpoint in `directory`."""
        state = self._state_in(directory)
        state.ema = self._state.ema
        state.finish(self.progress)
        return checkpoint_in(directory)

    def train(self, until: int) -> list[float]:
        """Steps up to `until`; the mean loss of each."""
        losses = []
        while self.progress.step < until:
            self.engine.set_learning_rate(self.schedule(self.progress.step))
            batches = [next(self.loader) for _ in range(self.accumulation)]
            for batch in batches:
                for i, position in enumerate(batch.positions):
                    seen = batch.images[i].numpy().tobytes() + batch.labels[i].numpy().tobytes()
                    self.stream[position] = hashlib.blake2b(seen, digest_size=6).hexdigest()
            loss, updated = one_step(self.engine, batches)
            assert updated
            losses.append(loss)
            self.progress.advance(BATCH, updated)
            self._state.average()
        return losses

    def whole(self) -> dict[str, torch.Tensor]:
        """Every parameter's fp32 master, and its average as "ema.<name>", put together from all ranks."""
        assert self._state.ema is not None
        shards = [("", s) for s in self.engine.master_shards()] + [("ema.", s) for s in self._state.ema.shards()]
        mine = [(kind + s.name, s.shape, s.start, s.data.detach().cpu().clone()) for kind, s in shards]
        found: dict[str, torch.Tensor] = {}
        for name, shape, start, data in (piece for pieces in dist.all_objects(mine) for piece in pieces):
            whole = found.setdefault(name, torch.full(shape, float("nan")))
            whole.view(-1)[start : start + data.numel()] = data
        return found

    def seen(self) -> dict[int, str]:
        """`stream` of all ranks."""
        return {position: digest for part in dist.all_objects(self.stream) for position, digest in part.items()}


def misplace(run: Run, fault: str) -> None:
    """What a reshape that is wrong might do; the comparisons must see it."""
    shards: list[Shard] = [*run.engine.master_shards(), *run.engine.state_shards()]
    for shard in shards:
        if fault == "momentum lost" and shard.name.endswith(".exp_avg"):
            shard.data.zero_()
        if fault == "fragment shifted" and shard.name == SHIFTED:
            shard.data.copy_(shard.data.roll(1))
    run.engine.refresh_weights()


def differing(one: Path, other: Path) -> list[str]:
    """Names of tensors, and keys of the training state, that two checkpoints do not have in common bit for bit."""
    tensors = []
    for directory in (one, other):
        files = [
            (path.name.split("-")[0].removesuffix(".safetensors"), path) for path in directory.glob("*.safetensors")
        ]
        tensors.append({f"{kind}|{name}": tensor for kind, path in files for name, tensor in load_file(path).items()})
    states = [json.loads((directory / "training_state.json").read_text()) for directory in (one, other)]
    return [
        *(name for name in tensors[0].keys() | tensors[1].keys() if _bits(tensors[0], name) != _bits(tensors[1], name)),
        *(key for key in states[0] if key not in DESCRIBES_THE_SAVER and states[0][key] != states[1].get(key)),
    ]


def _bits(tensors: dict[str, torch.Tensor], name: str) -> Any:
    tensor = tensors.get(name)
    return tensor is not None and (tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes())


def unbroken(root: Path, cell: Cell) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A run that saves on the way and goes on; what it did after the save."""
    run = Run(cell, root / "none")
    run.train(SAVED_AT)
    run.save(root / "saves" / str(cell))
    start, run.stream = run.whole(), {}
    facts: dict[str, Any] = {"losses": run.train(STEPS), "stream": run.seen()}
    end = run.whole()
    run.engine.close()
    return facts, {**end, **{f"start|{name}": value for name, value in start.items()}}


def gone_on(root: Path, source: Cell, cell: Cell, fault: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A run in `cell` from the save of `source`, spoiled on purpose if there is a `fault`."""
    saves, again = root / "saves" / str(source), root / f"again-{cell.ranks}"
    run = Run(cell, saves)
    assert run.progress.step == SAVED_AT
    if fault:
        misplace(run, fault)
    facts: dict[str, Any] = {}
    path = run.save(again)
    if dist.is_main():
        facts["differing"] = differing(checkpoint_in(saves), path)
        shutil.rmtree(again)
    facts |= {"losses": run.train(STEPS), "stream": run.seen()}
    end = run.whole()
    run.engine.close()
    return facts, end


def checkpoint_in(directory: Path) -> Path:
    """The one checkpoint that a run directory of this matrix holds."""
    return RunDirectory(directory).checkpoints / f"step-{SAVED_AT:09d}"


def main(root: Path) -> None:
    init_distributed()
    plan = json.loads((root / f"plan-{dist.world_size()}.json").read_text())
    found: dict[str, Any] = {}
    parameters: dict[str, torch.Tensor] = {}

    def keep(name: str, began: float, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        found[name] = {**facts, "seconds": time.monotonic() - began}
        parameters.update({f"{name}|{key}": value for key, value in tensors.items()})

    for cell in plan["saves"]:
        keep(cell, time.monotonic(), *unbroken(root, Cell.of(cell)))
    for source, cell, fault in plan["loads"]:
        wait_for(checkpoint_in(root / "saves" / source))
        keep(run_name(source, cell, fault), time.monotonic(), *gone_on(root, Cell.of(source), Cell.of(cell), fault))
    if dist.is_main():
        save_file(parameters, str(root / f"found-{dist.world_size()}.safetensors"))
        (root / f"found-{dist.world_size()}.json").write_text(json.dumps(found))
    dist.leave(0)


def run_name(source: str, cell: str, fault: str = "") -> str:
    """What a run that goes on is called in the findings."""
    return f"{source} -> {cell} {fault}".strip()


def wait_for(save: Path, seconds: float = 300) -> None:
    """Until another launch has committed the save that this one goes on from."""
    deadline = time.monotonic() + seconds
    while dist.is_main() and not save.exists():
        assert time.monotonic() < deadline, f"nobody made {save}"
        threading.Event().wait(0.05)
    dist.barrier()


if __name__ == "__main__":
    main(Path(next(word for word in sys.argv[1:] if not word.startswith("--"))))
