"""Filling masters, optimizer state and average: from a checkpoint of this course, from other weights, or from nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

from vitds import dist
from vitds.checkpoint.ema import Ema
from vitds.checkpoint.exchange.weights import WeightsFile
from vitds.checkpoint.format import EMA, MODEL, OPTIMIZER
from vitds.checkpoint.load import Checkpoint
from vitds.checkpoint.progress import Progress
from vitds.checkpoint.transfer import BIAS, transfer_of
from vitds.errors import UserError
from vitds.identity import FULL_ORDER, identity
from vitds.layout import Shard
from vitds.models import ViTForImageClassification, resample_position_embedding
from vitds.schedules import Schedule
from vitds.zero.engine import TrainingEngine


@dataclass(frozen=True)
class Start:
    """The ways in which one run's state can begin; `engine.refresh_weights` has been called after `resume` alone."""

    engine: TrainingEngine
    model: ViTForImageClassification
    schedule: Schedule
    resolved: dict[str, Any]
    ema: Ema | None

    def resume(self, checkpoint: Checkpoint) -> Progress:
        """Everything from a checkpoint of this course. Collective.

        Raises:
            UserError: of another optimizer, stream or base rate; past the run's end; past steps with other rates.
        """
        state = checkpoint.training_state
        stored, ours = state["optimizer"]["type"], self.resolved["optimizer"]["type"]
        if stored != ours:
            raise UserError(f"{checkpoint.path}: holds the state of optimizer {stored!r}, the run file has {ours!r}")
        if checkpoint.step > self.schedule.total_steps:
            raise UserError(
                f"{checkpoint.path}: is {checkpoint.step} steps on, the run file's total is {self.schedule.total_steps}"
            )
        ours_now = self.identity()
        there = {"order": FULL_ORDER} | state["stream"]
        changed = [
            f"{key}: {there[key]} there, {ours_now[key]} here" for key in ours_now if there[key] != ours_now[key]
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
        wanted = {MODEL: self.engine.master_shards(), OPTIMIZER: self.engine.state_shards(to_fill=True)}
        if self.ema is not None and EMA in checkpoint.kinds:
            wanted[EMA] = self.ema.shards()
        checkpoint.read_into(wanted)
        self.engine.restore_counters(state["counters"])
        self.engine.refresh_weights()
        if self.ema is not None and EMA not in checkpoint.kinds:
            self.ema.reset()
        return Progress(**{field.name: state[field.name] for field in fields(Progress)})

    def identity(self) -> dict[str, Any]:
        """What must stay for a state to go on exactly: the image stream, and the rates that the schedule multiplies."""
        groups = self.engine.groups.values()
        return {
            "seed": self.resolved["vitds"]["train"]["seed"],
            "global_batch": self.resolved["train_batch_size"],
            "order": identity(self.resolved)["vitds.data.order"],
            "rates": {g.name: [g.lr * g.lr_mult, g.weight_decay, g.frozen] for g in groups},
        }

    def transfer(self, weights: WeightsFile, head: str = "auto") -> tuple[str, ...]:
        """Masters from another model's weights, as `plan_transfer` says; what is not simply taken is returned in words.
        Collective.

        Raises:
            UserError: on all ranks, see `plan_transfer`.
        """
        frozen = [name for group in self.engine.groups.values() if group.frozen for name in group.names]
        plan = dist.together(lambda: transfer_of(weights, self.model, head, frozen))
        shards = self.engine.master_shards()
        weights.read_into([shard for shard in shards if shard.name in plan.kept])
        for shard in shards:
            if shard.name in plan.resampled:
                stored = weights.read_tensor(shard.name).view(weights.specs[shard.name].shape)
                value = resample_position_embedding(stored, shard.shape[1]).reshape(-1)
                shard.data.copy_(value[shard.start : shard.start + shard.data.numel()])
            elif shard.name == BIAS and plan.bias_shift:
                shard.data.add_(plan.bias_shift)
        self.initialise([shard for shard in shards if shard.name in plan.fresh])
        return plan.notes

    def initialise(self, shards: list[Shard]) -> None:
        """Initial fp32 values, one parameter at a time: a function of (seed, name), so each rank makes its own slices."""
        seed = self.resolved["vitds"]["train"]["seed"]
        for shard in shards:
            if shard.data.numel():
                value = self.model.initial_tensor(shard.name, seed).view(-1)
                shard.data.copy_(value[shard.start : shard.start + shard.data.numel()])


def _say(schedule: Schedule) -> str:
    stored = schedule.to_json()
    return f"{stored['type']}, total {stored['total_steps']}, {json.dumps(stored['params'])}"
