"""The whole state of a run: when it is saved, what a checkpoint holds besides tensors, and where a start finds it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vitds import dist
from vitds.checkpoint.ema import Ema, EmaSection
from vitds.checkpoint.exchange.weights import open_weights
from vitds.checkpoint.facts import facts
from vitds.checkpoint.format import EMA, MODEL, OPTIMIZER
from vitds.checkpoint.load import newest_checkpoint, open_checkpoint
from vitds.checkpoint.progress import Progress
from vitds.checkpoint.retention import CheckpointSection, finish_deletions, prune, remove_leftovers
from vitds.checkpoint.save import Saver
from vitds.checkpoint.start import Start
from vitds.checkpoint.transfer import source_of
from vitds.data import BadSamples, TooManyBad
from vitds.errors import Preempted, Stopped
from vitds.guard import spoiled
from vitds.identity import Images
from vitds.interruption import Interruption
from vitds.json_files import finite
from vitds.layout import Shard
from vitds.models import (
    VitdsImageProcessor,
    ViTForImageClassification,
    model_card,
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
        images: by role, how many they are, for the model card.
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
        images: Images | None = None,
    ) -> None:
        self.engine, self.model, self.schedule, self.resolved = engine, model, schedule, resolved
        self.processor, self.directory, self.section, self.images = processor, directory, section, images or {}
        self._ema_section = ema or EmaSection()
        frozen = [name for group in engine.groups.values() if group.frozen for name in group.names]
        self.ema = Ema(engine.master_shards, ema.decay, frozen) if ema is not None and ema.decay is not None else None
        self._start = Start(engine, model, schedule, resolved, self.ema)
        self.saver = Saver(
            directory.checkpoints, background=section.background, bucket_bytes=section.bucket_mib * 2**20
        )
        self._on_disk: tuple[int, int] | None = None
        """`Progress.mark` of the checkpoint that a start would take, or of what it would make without one."""
        self._begun: tuple[int, int] | None = None
        self._periodic: tuple[int, int] | None = None
        """Step and evaluation of the last save."""
        self._safe: int | None = None
        self._skips: list[tuple[int, int]] = []
        """Given up before this start or its last rollback: what the next one gives up, `restore` passes over and says so,
        and the save that it has to commit first must not drop in silence."""
        self._noted = False
        self.during: Callable[..., AbstractContextManager[Any]] = lambda *_, **__: nullcontext()
        """Entered around what takes another time than a step, and not the same each time (vitds.cluster.Watch.during)."""

    def save(self, progress: Progress, safe: int | None = None) -> None:
        """Begin to write `directory`/step-…, once for a step; `commit` ends it. Collective.

        Args:
            safe: position before which a rollback from here would go back; a checkpoint from before it is kept.

        Raises:
            Stopped: it cannot be written and `on_error` is stop.
        """
        self._safe = safe
        if self._periodic != (progress.step, progress.evaluated):
            with self.during("saving", learns=False):
                self._write(progress)

    def _write(self, progress: Progress) -> None:
        versions = {name: version(name) for name in ("vitds", "torch", "deepspeed", "transformers")}
        unlike = getattr(self.processor, "evaluation_transforms", None)
        told = facts(self.resolved, progress, self.schedule.total_steps, self.images, versions, unlike)
        state = {
            **finite(asdict(progress)),
            "stream": self._start.identity(),
            "schedule": self.schedule.to_json(),
            "optimizer": self.resolved["optimizer"],
            "counters": self.engine.counters(),
            "world_size": dist.world_size(),
            "zero_stage": self.engine.stage,
            "versions": versions,
        }
        extra = {
            "config.json": self.model.config.to_json_string(use_diff=False),
            "preprocessor_config.json": self.processor.to_json_string(),
            "README.md": model_card(self.model.config, told),
        }
        dist.together(self.directory.check_owner)
        self.commit()
        if self._on_disk == progress.mark():
            return
        self._begun, self._periodic = progress.mark(), (progress.step, progress.evaluated)
        try:
            self.saver.begin(progress.step, self._tensors(), state, extra)
        except Stopped as error:
            self._failed(error)

    def commit(self) -> None:
        """Make the save in flight, if there is one, a checkpoint; drop what need not be kept. Collective.

        Raises:
            Stopped: it could not be written and `on_error` is stop.
        """
        if self.saver.pending:
            with self.during("saving", learns=False):
                self._commit()

    def _commit(self) -> None:
        dist.together(self.directory.check_owner)
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
        keep_last, keep_every = self.section.keep_last, self.section.keep_every_steps
        prune(self.directory.checkpoints, keep_last, keep_every, saved.path, self._skips, self._safe)

    def finish(self, progress: Progress) -> None:
        """The state of `progress` is on disk, or a start would arrive at it, when this returns. Collective.

        Raises:
            Stopped: it could not be written, whatever `on_error` says.
        """
        if progress.step == 0:
            return  # a start makes this state anew
        with self.during("saving", learns=False):
            self._write(progress)
            self.commit()
        if self._on_disk != progress.mark():
            raise Stopped(f"the state of step {progress.step} could not be saved")
        if progress.step == self.schedule.total_steps:  # a preempted run has no time for it
            with self.during("saving", learns=False):
                dist.together(finish_deletions)

    def preempted(self, progress: Progress, reason: Preempted) -> Preempted:
        """Save, leave word of it, and return what the run then ends with. Collective; raises as `finish` does."""
        self.finish(progress)
        self.directory.preempted(progress.step, str(reason))
        return Preempted(f"{reason}: saved at step {progress.step}")

    def stopped(self, progress: Progress, error: Stopped | TooManyBad) -> None:
        """Keep what is worth having at an edge where the run ends: what is being written, and where it may go on with a
        higher cap, the state itself. Collective; raises as `finish` does."""
        if isinstance(error, TooManyBad):
            self.finish(progress)
        self.commit()

    def edge(self, interruption: Interruption, bad: BadSamples, beat: Callable[[], None] = lambda: None) -> None:
        """Where nothing is half done, before a micro batch or a batch of an evaluation is used: weights and state are
        those of the last step. Ranks agree on what happened meanwhile. Collective.

        Args:
            interruption: of this process.
            bad: of this run; what a rank has met is shared.
            beat: called first; who watches over this rank sees that it gets on.

        Raises:
            TooManyBad: more images cannot be used than the run file allows.
            Preempted: some rank was asked to stop.
            Stopped: see `commit`.
        """
        beat()
        stop, writing, news = dist.any_rank([interruption.reason is not None, self.saver.busy, bad.news])
        if not writing:
            self.commit()
        if news:
            bad.share()
        if stop:
            raise Preempted(next(filter(None, dist.all_objects(interruption.reason))))

    def average(self) -> None:
        """After each update of the weights: take them into their average, where there is one."""
        if self.ema is not None:
            self.ema.update()

    def restore(self, init_from: Any | None = None) -> tuple[Progress, str]:
        """Fill masters, optimizer state and average: own checkpoint, else `init_from`, else the initialisers. Collective.

        Args:
            init_from: InitFromSection, or None.

        A checkpoint that learnt from positions which the run has given up since is passed over. A save in flight is
        committed first.

        Returns:
            Where to go on, and a sentence that says from what.

        Raises:
            UserError: checkpoints that exist and cannot be used; past steps with other learning rates.
        """
        with self.during("loading", learns=False):
            return self._restore(init_from)

    def _restore(self, init_from: Any | None) -> tuple[Progress, str]:
        self.commit()
        skips = self._skips = self.directory.skips
        dist.together(lambda: remove_leftovers(self.directory.checkpoints))
        own = newest_checkpoint(
            self.directory.checkpoints, self.section.verify, passed_over=lambda state: spoiled(state, skips)
        )
        self._on_disk = self._periodic = None
        if own is not None:
            progress, origin = self._start.resume(own), f"resumed from {own.path}"
            if self.ema is not None and EMA not in own.kinds:
                origin += ", whose weights begin an average"
            self._on_disk, self._periodic = progress.mark(), (progress.step, progress.evaluated)
        elif init_from is not None and init_from.what == "all":
            path = dist.broadcast_object(dist.together(lambda: source_of(Path(init_from.path))))
            progress, origin = self._start.resume(open_checkpoint(path, self.section.verify)), f"forked from {path}"
            self._periodic = (progress.step, progress.evaluated)
        else:
            progress, origin = Progress(), "from scratch"
            if init_from is not None:
                kind = EMA if init_from.what == "ema" else MODEL
                path = dist.broadcast_object(dist.together(lambda: source_of(Path(init_from.path))))
                changed = self._start.transfer(open_weights(path, kind, self.section.verify), init_from.head)
                origin = "; ".join([f"{init_from.what} from {path}", *changed])
            else:
                self._start.initialise(self.engine.master_shards())
            self.engine.forget()
            self.engine.refresh_weights()
            if self.ema is not None:
                self.ema.reset()
        for start, end in skips:
            progress.skip(start, end)
        return progress, origin

    def evaluated(self) -> Iterator[tuple[str, AbstractContextManager[None]]]:
        """The weights that are to be evaluated: what their metrics' names have behind the first word ("" or "_ema"), and a
        context in which they are the engine's."""
        if self.ema is None or self._ema_section.evaluate != "ema":
            yield "", nullcontext()
        if self.ema is not None and self._ema_section.evaluate != "weights":
            yield "_ema", self.ema.exchanged(self.engine.refresh_weights)

    def describe(self) -> str:
        """What one save costs here, measured by writing a little; a warning where a preemption would not leave the time."""
        if self.engine.foreign is not None and not self._on_disk:
            return ""  # its state comes with the first step
        share, rate = self.saver.share_and_speed(self._tensors(), PROBE_BYTES)
        return cost_of_saving(share, rate) if share > PROBE_BYTES else ""

    def _tensors(self) -> dict[str, list[Shard]]:
        tensors = {MODEL: self.engine.master_shards(), OPTIMIZER: self.engine.state_shards()}
        return tensors if self.ema is None else {**tensors, EMA: self.ema.shards()}

    def _failed(self, error: Stopped) -> None:
        if self.section.on_error == "stop":
            raise error
        self.directory.event("save failed", reason=str(error))
        if dist.is_main():
            print(f"vitds: {error}; the run goes on without it", file=sys.stderr, flush=True)


def cost_of_saving(share: int, bytes_per_second: float) -> str:
    """What a save of `share` bytes a rank takes; with a warning where a preempted job may not have that time."""
    seconds = share / bytes_per_second
    text = f"a save writes up to {share / 1e9:.2f} GB a rank: about {seconds:.0f} s at the {bytes_per_second / 1e6:.0f} MB/s just measured"
    if 2 * seconds <= KILL_BUDGET_SECONDS * 2 / 3:  # one that is in flight comes first
        return text
    return (
        f"{text}\nwarning: a preempted job is killed {KILL_BUDGET_SECONDS} s after its notice, which may be before it has saved; "
        "it would go on from its last checkpoint: save more often, or to faster storage"
    )
