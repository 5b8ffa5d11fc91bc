"""The whole state of a run: what a checkpoint holds besides tensors, and where a start takes its state from."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vitds import dist
from vitds.checkpoint.ema import Ema, EmaSection
from vitds.checkpoint.format import EMA, MODEL, OPTIMIZER
from vitds.checkpoint.load import Checkpoint, WeightsFile, newest_checkpoint, open_checkpoint
from vitds.checkpoint.progress import Progress
from vitds.checkpoint.retention import CheckpointSection, finish_deletions, prune, remove_leftovers
from vitds.checkpoint.save import Saver, write_bandwidth
from vitds.errors import Preempted, Stopped, UserError
from vitds.guard import spoiled
from vitds.interruption import Interruption
from vitds.json_files import finite
from vitds.layout import Shard
from vitds.models import (
    VitdsImageProcessor,
    ViTForImageClassification,
    model_card,
    resample_position_embedding,
)
from vitds.run_directory import RunDirectory
from vitds.schedules import Schedule
from vitds.zero.engine import TrainingEngine

KILL_BUDGET_SECONDS = 30
"""DeepSpeed's launcher kills its ranks so long after it has asked them to end."""
PROBE_BYTES = 64 * 2**20


class RunState:
    """Saves and restores one run's state.

    Args:
        engine: holds the masters and the optimizer's state.
        model: names, shapes, initial values and configuration.
        schedule: of this run; past steps of a restored one must have had the same rates.
        resolved: the run file with every key explicit.
        processor: prepares images for the saved model.
        directory: the run's; checkpoints go to its `checkpoints/`, and what happens to them into its events.
        section: when a failed save stops the run, how thoroughly to verify, what to keep.
        ema: whether to keep an average of the weights.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        model: ViTForImageClassification,
        schedule: Schedule,
        resolved: dict[str, Any],
        processor: VitdsImageProcessor,
        directory: RunDirectory,
        section: CheckpointSection,
        ema: EmaSection | None = None,
    ) -> None:
        self.engine, self.model, self.schedule, self.resolved = engine, model, schedule, resolved
        self.processor, self.directory, self.section = processor, directory, section
        self._ema_section = ema or EmaSection()
        self.ema = Ema(engine.master_shards, ema.decay) if ema is not None and ema.decay is not None else None
        self.saver = Saver(
            directory.checkpoints, background=section.background, bucket_bytes=section.bucket_mib * 2**20
        )
        self._on_disk = 0
        """Position of the newest state that a start would come back to."""
        self._begun = 0
        self._noted = False

    def save(self, progress: Progress) -> None:
        """Begin to write `directory`/step-…, if this very state is not on disk; `commit` ends it. Collective.

        Raises:
            Stopped: it cannot be written and `on_error` is stop.
        """
        state = {
            **finite(asdict(progress)),
            "stream": self._identity(),
            "schedule": self.schedule.to_json(),
            "optimizer": self.resolved["optimizer"],
            "counters": self.engine.counters(),
            "world_size": dist.world_size(),
            "zero_stage": self.engine.stage,
            "versions": {name: version(name) for name in ("vitds", "torch", "deepspeed", "transformers")},
        }
        extra = {
            "config.json": self.model.config.to_json_string(use_diff=False),
            "preprocessor_config.json": self.processor.to_json_string(),
            "README.md": model_card(self.model.config),
        }
        self.directory.check_owner()
        self.commit()
        if self._on_disk == progress.position:
            return
        self._begun = progress.position
        try:
            self.saver.begin(progress.step, self._tensors(), state, extra)
        except Stopped as error:
            self._failed(error)

    def commit(self) -> None:
        """Make the save in flight, if there is one, a checkpoint; drop what need not be kept. Collective.

        Raises:
            Stopped: it could not be written and `on_error` is stop.
        """
        if not self.saver.pending:
            return
        self.directory.check_owner()
        try:
            saved = self.saver.commit()
        except Stopped as error:
            self._failed(error)
            return
        self._on_disk = self._begun
        self.directory.event("save", **{**asdict(saved), "path": str(saved.path)})
        if saved.note and not self._noted and dist.is_main():
            print(f"vitds: {saved.path.name}: {saved.note}", file=sys.stderr, flush=True)
        self._noted = saved.note is not None
        prune(self.directory.checkpoints, self.section.keep_last, self.section.keep_every_steps, newest=saved.path)

    def finish(self, progress: Progress) -> None:
        """The state of `progress` is on disk, or a start would arrive at it, when this returns. Collective.

        Raises:
            Stopped: it could not be written, whatever `on_error` says.
        """
        self.save(progress)
        self.commit()
        if self._on_disk != progress.position:
            raise Stopped(f"the state of step {progress.step} could not be saved")
        if progress.step == self.schedule.total_steps:  # a preempted run has no time for it
            finish_deletions()

    def edge(self, interruption: Interruption) -> None:
        """Where nothing is half done, between two micro batches or two batches of an evaluation: weights and state are
        those of the last step. Ranks agree on what happened meanwhile. Collective.

        Raises:
            Preempted: some rank was asked to stop.
            Stopped: see `commit`.
        """
        stop, writing = dist.any_rank([interruption.reason is not None, self.saver.busy])
        if not writing:
            self.commit()
        if stop:
            raise Preempted(next(filter(None, dist.all_objects(interruption.reason))))

    def average(self) -> None:
        """After each update of the weights: take them into their average, where there is one."""
        if self.ema is not None:
            self.ema.update()

    def restore(self, init_from: Any | None = None) -> tuple[Progress, str]:
        """Fill masters, optimizer state and average: own checkpoint, else `init_from`, else the initialisers. Collective.

        Args:
            init_from: section with `path` and `what`, or None.

        A checkpoint that learnt from positions which the run has given up since is passed over. A save in flight is
        committed first.

        Returns:
            Where to go on, and a sentence that says from what.

        Raises:
            UserError: checkpoints that exist and cannot be used; past steps with other learning rates.
        """
        self.commit()
        skips = self.directory.skips
        dist.together(lambda: remove_leftovers(self.directory.checkpoints))
        own = newest_checkpoint(
            self.directory.checkpoints, self.section.verify, passed_over=lambda state: spoiled(state, skips)
        )
        if own is not None:
            progress, origin = self._resume(own), f"resumed from {own.path}"
        elif init_from is not None and init_from.what == "all":
            progress = self._resume(open_checkpoint(Path(init_from.path), self.section.verify))
            origin = f"forked from {init_from.path}"
        else:
            progress, origin = Progress(), "from scratch"
            if init_from is not None:
                changed = self._transfer(WeightsFile(Path(init_from.path), EMA if init_from.what == "ema" else MODEL))
                origin = "; ".join([f"{init_from.what} from {init_from.path}", *changed])
            else:
                self._initialise(self.engine.master_shards())
            self.engine.forget()
            self.engine.refresh_weights()
            if self.ema is not None:
                self.ema.reset()
        for start, end in skips:
            progress.skip(start, end)
        self._on_disk = progress.position
        return progress, origin

    def evaluated(self) -> Iterator[tuple[str, AbstractContextManager[None]]]:
        """The weights that are to be evaluated: the prefix of their metrics' names, and a context in which they are the
        engine's."""
        if self.ema is None or self._ema_section.evaluate != "ema":
            yield "eval", nullcontext()
        if self.ema is not None and self._ema_section.evaluate != "weights":
            yield "eval_ema", self.ema.exchanged(self.engine.refresh_weights)

    def describe(self) -> str:
        """What one save costs here, measured by writing a little; a warning where a preemption would not leave the time."""
        if self.engine.foreign is not None and not self._on_disk:
            return ""  # its state comes with the first step
        share = self.saver.plan(self._tensors())
        return (
            cost_of_saving(share, write_bandwidth(self.directory.checkpoints, PROBE_BYTES))
            if share > PROBE_BYTES
            else ""
        )

    def _tensors(self) -> dict[str, list[Shard]]:
        tensors = {MODEL: self.engine.master_shards(), OPTIMIZER: self.engine.state_shards()}
        return tensors if self.ema is None else {**tensors, EMA: self.ema.shards()}

    def _failed(self, error: Stopped) -> None:
        if self.section.on_error == "stop":
            raise error
        if dist.is_main():
            print(f"vitds: {error}; the run goes on without it", file=sys.stderr, flush=True)

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
        wanted = {MODEL: self.engine.master_shards(), OPTIMIZER: self.engine.state_shards(to_fill=True)}
        if self.ema is not None and EMA in checkpoint.kinds:
            wanted[EMA] = self.ema.shards()
        checkpoint.read_into(wanted)
        self.engine.restore_counters(state["counters"])
        self.engine.refresh_weights()
        if self.ema is not None and EMA not in checkpoint.kinds:
            self.ema.reset()
        return Progress(**{field.name: state[field.name] for field in fields(Progress)})

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


def cost_of_saving(share: int, bytes_per_second: float) -> str:
    """What a save of `share` bytes a rank takes; with a warning where a preempted job may not have that time."""
    seconds = share / bytes_per_second
    text = f"a save writes up to {share / 1e9:.2f} GB a rank: about {seconds:.0f} s at the {bytes_per_second / 1e6:.0f} MB/s just measured"
    if seconds <= KILL_BUDGET_SECONDS * 2 / 3:
        return text
    return (
        f"{text}\nwarning: a preempted job is killed {KILL_BUDGET_SECONDS} s after its notice, which may be before it has saved; "
        "it would go on from its last checkpoint: save more often, or to faster storage"
    )


def _say(schedule: Schedule) -> str:
    stored = schedule.to_json()
    return f"{stored['type']}, total {stored['total_steps']}, {json.dumps(stored['params'])}"
