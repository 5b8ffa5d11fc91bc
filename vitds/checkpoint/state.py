"""The whole state of a run: what a checkpoint holds besides tensors, and where a start takes its state from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vitds import dist
from vitds.checkpoint.load import Checkpoint, WeightsFile, newest_checkpoint, open_checkpoint
from vitds.checkpoint.retention import CheckpointSection, prune, remove_leftovers
from vitds.checkpoint.save import save_checkpoint
from vitds.errors import UserError
from vitds.layout import Shard
from vitds.models import (
    VitdsImageProcessor,
    ViTForImageClassification,
    model_card,
    resample_position_embedding,
)
from vitds.schedules import Schedule
from vitds.zero.engine import TrainingEngine


@dataclass
class Progress:
    """How far a run is; with the tensors, all that a resume needs."""

    step: int = 0
    """Updates made."""
    position: int = 0
    """Next global position of the image stream."""
    images_seen: int = 0
    """Images whose gradient was applied."""
    skipped: list[list[int]] = field(default_factory=list)
    """[start, end) of positions whose batch was dropped."""

    def advance(self, global_batch: int, updated: bool) -> None:
        """One global batch further; a dropped one moves the position alone."""
        self.position += global_batch
        if updated:
            self.step += 1
            self.images_seen += global_batch
        else:
            self.skipped.append([self.position - global_batch, self.position])


@dataclass(frozen=True)
class RunState:
    """Saves and restores one run's state.

    Args:
        engine: holds the masters and the optimizer's state.
        model: names, shapes, initial values and configuration.
        schedule: of this run; past steps of a restored one must have had the same rates.
        resolved: the run file with every key explicit.
        processor: prepares images for the saved model.
    """

    engine: TrainingEngine
    model: ViTForImageClassification
    schedule: Schedule
    resolved: dict[str, Any]
    processor: VitdsImageProcessor

    def save(
        self,
        directory: Path,
        progress: Progress,
        section: CheckpointSection,
        evaluation: dict[str, float] | None = None,
    ) -> Path:
        """Write `directory`/step-… and drop what need not be kept. Collective; Stopped where it cannot be written."""
        state = {
            **asdict(progress),
            "stream": self._identity(),
            "schedule": self.schedule.to_json(),
            "optimizer": self.resolved["optimizer"],
            "counters": self.engine.counters(),
            "evaluation": evaluation or {},
            "world_size": dist.world_size(),
            "zero_stage": self.engine.stage,
            "versions": {name: version(name) for name in ("vitds", "torch", "deepspeed", "transformers")},
        }
        extra = {
            "config.json": self.model.config.to_json_string(use_diff=False),
            "preprocessor_config.json": self.processor.to_json_string(),
            "README.md": model_card(self.model.config),
        }
        masters, optimizer = self.engine.master_shards(), self.engine.state_shards()
        path = save_checkpoint(directory, progress.step, masters, optimizer, state, extra)
        prune(directory, section.keep_last, section.keep_every_steps, newest=path)
        return path

    def restore(self, directory: Path, section: CheckpointSection, init_from: Any | None) -> tuple[Progress, str]:
        """Fill masters and optimizer state: own checkpoint, else `init_from`, else the initialisers. Collective.

        Args:
            directory: the run's `checkpoints/`.
            section: how thoroughly to verify.
            init_from: section with `path` and `what`, or None.

        Returns:
            Where to go on, and a sentence that says from what.

        Raises:
            UserError: checkpoints that exist and cannot be used; past steps with other learning rates.
        """
        remove_leftovers(directory)
        own = newest_checkpoint(directory, section.verify)
        if own is not None:
            return self._resume(own), f"resumed from {own.path}"
        if init_from is not None and init_from.what == "all":
            return self._resume(open_checkpoint(Path(init_from.path), section.verify)), f"forked from {init_from.path}"
        if init_from is not None:
            changed = self._transfer(WeightsFile(Path(init_from.path)))
            self.engine.refresh_weights()
            return Progress(), "; ".join([f"weights from {init_from.path}", *changed])
        self._initialise(self.engine.master_shards())
        self.engine.refresh_weights()
        return Progress(), "from scratch"

    def _resume(self, checkpoint: Checkpoint) -> Progress:
        state = checkpoint.training_state
        stored, ours = state["optimizer"]["type"], self.resolved["optimizer"]["type"]
        if stored != ours:
            raise UserError(f"{checkpoint.path}: holds the state of optimizer {stored!r}, the run file has {ours!r}")
        if checkpoint.step > self.schedule.total_steps:
            raise UserError(
                f"{checkpoint.path}: is {checkpoint.step} steps on, the run file's total is {self.schedule.total_steps}"
            )
        ours_now = self._identity()
        changed = [
            f"{key}: {state['stream'][key]} there, {ours_now[key]} here"
            for key in ours_now
            if state["stream"][key] != ours_now[key]
        ]
        if changed:
            raise UserError(f"{checkpoint.path}: goes on only with the same stream and rates; {'; '.join(changed)}")
        past = Schedule.from_json(state["schedule"])
        differing = self.schedule.first_difference(past, checkpoint.step)
        if differing is not None:
            raise UserError(
                f"{checkpoint.path}: with this run file's schedule ({_say(self.schedule)}) step {differing} would have had the rate "
                f"factor {self.schedule(differing):.6g}, but it was trained with {past(differing):.6g} ({_say(past)}); keep the "
                "schedule, start from a step before they part, or begin a new run with vitds.init_from.what = weights"
            )
        checkpoint.read_into([*self.engine.master_shards(), *self.engine.state_shards(to_fill=True)])
        self.engine.restore_counters(state["counters"])
        self.engine.refresh_weights()
        return Progress(
            checkpoint.step, state["position"], state["images_seen"], [list(pair) for pair in state["skipped"]]
        )

    def _identity(self) -> dict[str, Any]:
        """What must stay for a state to go on exactly: the image stream, and the rates that the schedule multiplies."""
        groups = self.engine.groups.values()
        return {
            "seed": self.resolved["vitds"]["train"]["seed"],
            "global_batch": self.resolved["train_batch_size"],
            "rates": {g.name: [g.lr * g.lr_mult, g.weight_decay, g.frozen] for g in groups},
        }

    def _transfer(self, weights: WeightsFile) -> list[str]:
        """Masters from another model's weights: the classifier may have other classes and then starts afresh, the
        position embedding another number of patches and is resampled. Returns what was changed. Collective."""
        changed, same, fresh = [], [], []
        for shard in self.engine.master_shards():
            there = weights.specs.get(shard.name)
            if shard.name.startswith("head.") and (there is None or there.shape != tuple(shard.shape)):
                fresh.append(shard)
            elif shard.name == "pos_embed" and there is not None and there.shape[::2] == tuple(shard.shape)[::2]:
                if there.shape == tuple(shard.shape):
                    same.append(shard)
                    continue
                stored = weights.read_tensor(shard.name).view(there.shape)
                value = resample_position_embedding(stored, shard.shape[1]).reshape(-1)
                shard.data.copy_(value[shard.start : shard.start + shard.data.numel()])
                changed.append(f"position embedding resampled from {there.shape[1]} to {shard.shape[1]} patches")
            else:
                same.append(shard)
        weights.read_into(same)
        self._initialise(fresh)
        if fresh:
            changed.append("classifier starts afresh")
        return sorted(set(changed))

    def _initialise(self, shards: list[Shard]) -> None:
        """Initial fp32 values, one parameter at a time: a function of (seed, name), so each rank makes its own slices."""
        seed = self.resolved["vitds"]["train"]["seed"]
        for shard in shards:
            if shard.data.numel():
                value = self.model.initial_tensor(shard.name, seed).view(-1)
                shard.data.copy_(value[shard.start : shard.start + shard.data.numel()])


def _say(schedule: Schedule) -> str:
    stored = schedule.to_json()
    return f"{stored['type']}, total {stored['total_steps']}, {json.dumps(stored['params'])}"
