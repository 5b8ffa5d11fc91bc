"""What would make a run fit, or faster: one change of the run file alone, then two together, by their predicted speed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

from vitds.planning.devices import Device
from vitds.planning.memory import Memory, memory
from vitds.planning.scaling import Machine
from vitds.planning.shares import master_bytes
from vitds.planning.speed import StepTime, step_time
from vitds.planning.states import States
from vitds.planning.workload import Workload

POLICIES = ("none", "every:4", "every:3", "every:2", "selective", "full")
MOST = 2**16
"""No larger micro batch is looked for."""
FASTER = 1.005
"""A change that is to be worth saying is so many times as fast."""


@dataclass(frozen=True)
class Change:
    """Changes of the run file, and what comes of them."""

    settings: tuple[str, ...]
    """As `--set` takes them."""
    workload: Workload
    memory: Memory
    time: StepTime


@dataclass(frozen=True)
class Setting:
    """One change: what it sets, of which of the run file's freedoms, and how."""

    freedom: str
    setting: str
    apply: Callable[[Workload], Workload]


@dataclass(frozen=True)
class Place:
    """Where a run is to fit."""

    ranks: int
    device: Device
    machine: Machine
    mfu: float | None = None

    def judge(self, workload: Workload, states: States | None = None) -> tuple[Memory, StepTime]:
        """What it needs, and how fast it is."""
        return memory(workload, self.ranks, states), step_time(
            workload, self.ranks, self.device, self.machine, self.mfu
        )

    def holds(self, needed: Memory) -> bool:
        """Whether it fits."""
        return needed.total <= self.device.memory_bytes


def largest_micro_batch(workload: Workload, place: Place, most: int = MOST) -> int:
    """Images of the largest micro batch that fits, whatever the global batch; 0 where none does, `most` where more would."""
    states = States(workload, place.ranks)

    def fits(size: int) -> bool:
        return place.holds(memory(replace(workload, micro_batch=size), place.ranks, states))

    if fits(most):
        return most
    low, high = 0, 1
    while high < most and fits(high):
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fitting_micro_batch(workload: Workload, place: Place) -> Workload | None:
    """The same images a step with the largest micro batch that fits; None where none does."""
    most = largest_micro_batch(workload, place, workload.images)
    size = next((size for size in range(min(most, workload.images), 0, -1) if workload.images % size == 0), None)
    return workload.with_micro_batch(size) if size else None


def changes(workload: Workload, place: Place, *, faster_than: float | None, most: int = 8) -> list[Change]:
    """What makes it fit, from the fastest: single changes, and pairs that are faster than either alone.

    Args:
        faster_than: images/s; only what is faster, where the run fits as it is.
        most: of them.
    """
    found = list[Change]()
    settings = list(_settings(workload))
    for pair in [(setting,) for setting in settings] + list(combinations(settings, 2)):
        freedoms = {setting.freedom for setting in pair}
        if len(freedoms) < len(pair):
            continue
        # The micro batch comes last: how large it may be is for the others to say.
        changed, sizes_too = workload, False
        for setting in sorted(pair, key=lambda setting: setting.freedom == "micro batch"):
            if setting.freedom == "micro batch":
                sizes_too = True
                continue
            changed = setting.apply(changed)
        if sizes_too:
            smaller = fitting_micro_batch(changed, place)
            if smaller is None or smaller.micro_batch == workload.micro_batch:
                continue
            changed = smaller
        said = tuple(f"train_micro_batch_size_per_gpu={changed.micro_batch}" if s.freedom == "micro batch" else s.setting
                     for s in pair)  # fmt: skip
        needed, time = place.judge(changed)
        if not place.holds(needed):
            continue
        if faster_than is None or time.images_per_second > FASTER * faster_than:
            found.append(Change(said, changed, needed, time))
    found.sort(key=lambda change: (-change.time.images_per_second, len(change.settings)))
    return _distinct(found)[:most]


def _distinct(found: list[Change]) -> list[Change]:
    """Without pairs that are no faster than one of their halves alone."""
    return [
        change
        for change in found
        if not any(
            set(other.settings) < set(change.settings)
            and other.time.images_per_second * FASTER >= change.time.images_per_second
            for other in found
        )
    ]


def _settings(workload: Workload) -> Iterator[Setting]:
    """Every single change that there is."""
    job = workload.job
    yield Setting("micro batch", "train_micro_batch_size_per_gpu", lambda w: w)
    for policy in POLICIES:
        if policy != workload.policy:
            yield Setting("policy", f"vitds.train.activation_checkpointing={policy}", partial(_with_policy, policy))
    for stage in (1, 2, 3):
        if stage != job.stage:
            yield Setting("stage", f"zero_optimization.stage={stage}", partial(_at_stage, stage))
    if not workload.compiled:
        yield Setting("compile", "vitds.train.compile=true", lambda w: replace(w, compiled=True))
    if workload.optimizer != "ModifiedAdafactor":
        kept = {
            k: v for k, v in job.optimizer.get("params", {}).items() if k in ("lr", "weight_decay", "head_weight_decay")
        }
        said = json.dumps({"type": "ModifiedAdafactor", "params": kept}, separators=(",", ":"))
        yield Setting("optimizer", f"optimizer={said}", lambda w: w.with_optimizer("ModifiedAdafactor", **kept))
    if job.section.get("bf16", {}).get("enabled"):
        if master_bytes(job) == 4 and job.stage > 0:
            bf16 = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
            said = json.dumps(bf16, separators=(",", ":"))
            yield Setting("masters", f"bf16={said}", lambda w: _with_section(w, {"bf16": bf16}))
        if job.section.get("data_types", {}).get("grad_accum_dtype") != "bf16":
            types = {**job.section.get("data_types", {}), "grad_accum_dtype": "bf16"}
            yield Setting("sums", "data_types.grad_accum_dtype=bf16", lambda w: _with_section(w, {"data_types": types}))


def _with_policy(policy: str, workload: Workload) -> Workload:
    return workload.with_policy(policy)


def _at_stage(stage: int, workload: Workload) -> Workload:
    return replace(workload, job=workload.job.at_stage(stage))


def _with_section(workload: Workload, more: Mapping[str, Any]) -> Workload:
    return replace(workload, job=replace(workload.job, section={**workload.job.section, **more}))
