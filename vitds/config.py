"""The run file: DeepSpeed's keys as they are, plus one section `vitds`, which is the sum of the parts' sections.

Everything is read, typed and cross-checked before any process group starts; whatever is wrong is one `UserError`.
"""

from __future__ import annotations

import copy
import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vitds import dist
from vitds.checkpoint.ema import EmaSection
from vitds.checkpoint.retention import CheckpointSection
from vitds.checkpoint.transfer import InitFromSection, look_at, refuse_frozen_zeros
from vitds.cluster.section import ClusterSection, check_world_size
from vitds.data import DataSection, Sources, SourceSection, build_sources
from vitds.errors import UserError
from vitds.evaluation import FewshotSection, ProbeSet, open_sets
from vitds.guard import GuardSection
from vitds.json_files import override, read_object, say, walk
from vitds.lengths import Lengths
from vitds.metrics import MonitorSections, monitor_sections
from vitds.models import ModelSection, VitdsImageProcessor, ViTForImageClassification, build_config, check_compile_mode
from vitds.optim import OPTIMIZERS, LayoutOptimizer, check_optimizer
from vitds.optim.groups import Group, build_groups
from vitds.planning.refusal import refuse_what_cannot_fit, room_here
from vitds.planning.workload import workload_of
from vitds.schedules import SchedulerSection, build_schedule
from vitds.sections import key, parse, to_json, typed
from vitds.train_section import TrainSection
from vitds.zero.buckets import fit_buckets
from vitds.zero.engine import OWN_NAMES, client_optimizer, other_optimizer_names, precision, zero_stage
from vitds.zero.section import bf16_masters, check_deepspeed_section

DEFAULT_OPTIMIZER = {
    "type": "ModifiedAdafactor",
    "params": {"lr": 8e-4, "weight_decay": 0.03, "head_weight_decay": 3.0},
}
MONITORS = ("tensorboard", "wandb", "csv_monitor")
OURS = ("vitds", "_about", "scheduler", *MONITORS)
"""Top-level sections that never reach DeepSpeed; `optimizer` does not either where the class is ours."""


@dataclass(frozen=True)
class VitdsSection:
    """The section `vitds` of the run file."""

    model: ModelSection = key(ModelSection(), "The Vision Transformer.")
    data: DataSection = key(
        DataSection(SourceSection("synthetic")), "Where images come from and how they are prepared."
    )
    train: TrainSection = key(TrainSection(), "Length, seed and intervals.")
    checkpoint: CheckpointSection = key(CheckpointSection(), "When to save and what to keep.")
    fewshot: FewshotSection = key(FewshotSection(), "How well few images per class can be told apart by the features.")
    guard: GuardSection = key(GuardSection(), "What to do about losses and gradients that are not finite.")
    ema: EmaSection = key(EmaSection(), "An average of the weights beside them.")
    init_from: InitFromSection | None = key(None, "Weights or a whole state to start from.")
    groups: list[Any] = key([], "[[name pattern, {weight_decay, lr_mult, frozen}], …]: first full match wins.")
    plugins: list[str] = key(
        [], "Modules imported first; they may add to vitds.optim.OPTIMIZERS and the other registries."
    )
    cluster: ClusterSection = key(ClusterSection(), "World sizes allowed; hangs and slow ranks.")


@dataclass(frozen=True)
class RunFile:
    """A run file, checked. Each part of the program receives its own section of it, never the whole."""

    deepspeed: dict[str, Any]
    """DeepSpeed's half, as handed to it."""
    optimizer: dict[str, Any]
    rates: dict[str, Any]
    """lr, weight_decay and head_weight_decay, which make the parameter groups."""
    scheduler: SchedulerSection
    monitors: MonitorSections
    vitds: VitdsSection
    global_batch: int
    micro_batch: int
    accumulation: int
    resolved: dict[str, Any] = field(repr=False)
    """Every key explicit; written to the run directory and kept in checkpoints."""

    def lengths(self, images_per_epoch: int) -> Lengths:
        """All lengths in steps, once the size of the training set is known.

        Raises:
            UserError: a schedule that does not fit into the run.
        """
        part, known = self.vitds, {"global_batch": self.global_batch, "images_per_epoch": images_per_epoch}
        train, total = part.train, part.train.total.to_steps(**known)
        every = (train.log_every, train.eval_every, part.fewshot.every, train.diagnostics_every, part.checkpoint.every)
        log, evaluate, probe, diagnose, save = (length.to_steps(**known, total_steps=total) for length in every)
        schedule = build_schedule(self.scheduler, total_steps=total, **known)
        return Lengths(total, max(1, log), evaluate, probe, diagnose, save, schedule)


def load_run_file(path: str, overrides: list[str] | None = None, *, world_size: int | None = 1) -> RunFile:
    """Read, override, check and resolve a run file for a world size.

    Args:
        path: the JSON file.
        overrides: "a.b.c=value" strings; the value is JSON, else a string.
        world_size: ranks that are to train it; None where it is only looked at, whatever number it is meant for.

    Raises:
        UserError: anything wrong, with the file's name in front.
    """
    try:
        given = read_object(Path(path))
        for text in overrides or []:
            override(given, text)
        return _resolve(path, given, world_size)
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(str(path)) else f"{path}: {message}") from None


class Plan(NamedTuple):
    """What a run is made of, all of it checked and none of it on an accelerator."""

    sources: Sources
    lengths: Lengths
    groups: list[Group]
    model: ViTForImageClassification
    """On the meta device: it has shapes and no values."""
    processor: VitdsImageProcessor
    """Prepares images as the evaluation does."""
    images: dict[str, dict[str, Any]]
    """By role, what tells these images from others."""
    probes: list[ProbeSet]
    """The few-shot sets."""
    start: tuple[str, ...] = ()
    """What the run starts from, and what of it is not simply taken, in words; nothing of a run from scratch."""


def prepare(run: RunFile, *, forecast: bool = False, output: str | None = None) -> Plan:
    """Sources, lengths, model and parameter groups; whatever else can be wrong with a run file shows here.

    Args:
        forecast: whether this job's ranks can hold it is looked at, too.
        output: the run's directory, where it is about to start. If there are checkpoints in it already, what the run began with
            need not be there any more.

    Raises:
        UserError: data that is not there, a schedule that does not fit, a pattern that matches nothing, an optimizer
            that ZeRO would change, weights to start from that do not fit, few-shot sets that cannot be drawn from, a run that plainly needs more memory than there is.
    """
    part = run.vitds
    sources = build_sources(part.data, part.model.num_classes)
    with torch.device("meta"):
        model = ViTForImageClassification(build_config(part.model))
    model.config.name_classes(sources.train.class_names)
    model.set_activation_checkpointing(part.train.activation_checkpointing)
    groups = build_groups(model.shapes, **run.rates, decay_patterns=model.decay_patterns(), overrides=part.groups)
    client_optimizer(run.optimizer, zero_stage(run.deepspeed))
    frozen = [name for group in groups if group.frozen for name in group.names]
    begun = output is not None and any(Path(output, "checkpoints").glob("step-*"))
    start = look_at(part.init_from, model, frozen) if part.init_from is not None and not begun else ()
    if part.init_from is None and not begun:
        refuse_frozen_zeros(frozen)
    if start and output is not None and dist.is_main():
        say(f"vitds: vitds.init_from: {'; '.join(start)}")
    lengths = run.lengths(len(sources.train))
    if part.guard.spike == "rollback" and lengths.save == 0:
        raise UserError("vitds.checkpoint.every_steps: 0 leaves a rollback (vitds.guard.spike) nothing to go back to")
    if forecast:
        kind, memory_bytes, whose = room_here()
        refuse_what_cannot_fit(workload_of(run, kind, model), dist.world_size(), memory_bytes, whose)
    processor = VitdsImageProcessor(**part.data.processor(part.model.image_size))
    if (unlike := getattr(processor, "evaluation_transforms", None)) is not None and dist.is_main():
        say(
            f"vitds: vitds.data.eval.transforms: the saved image processor resizes once and cuts out the middle, and cannot do "
            f"{json.dumps(unlike)}; what is opened from a checkpoint (vitds predict, vitds evaluate, transformers' pipeline) "
            "resizes the shorter edge instead, and will see other pixels than this run's evaluation"
        )
    return Plan(
        sources,
        lengths,
        groups,
        model,
        processor,
        sources.identity(),
        open_sets(part.fewshot, part.model.image_size),
        start,
    )


def batches(global_batch: int, micro_batch: int | None, world_size: int) -> tuple[int, int]:
    """(micro batch, accumulation) with global = micro × accumulation × world size.

    Raises:
        UserError: it does not divide; the message lists what would.
    """
    if global_batch % world_size:
        low = global_batch // world_size * world_size
        near = " or ".join(str(b) for b in (low, low + world_size) if b > 0)
        raise UserError(
            f"train_batch_size: {global_batch} does not divide over {world_size} ranks; {near} would, or a number of ranks among "
            f"{_divisors(global_batch)}"
        )
    per_rank = global_batch // world_size
    micro = micro_batch or per_rank
    if per_rank % micro:
        raise UserError(
            f"train_micro_batch_size_per_gpu: {micro} does not divide the {per_rank} images of each of {world_size} ranks "
            f"(train_batch_size {global_batch}); these would: {_divisors(per_rank)}; or a train_batch_size of "
            f"{max(1, global_batch // (micro * world_size)) * micro * world_size}"
        )
    return micro, per_rank // micro


def _divisors(number: int, most: int = 12) -> str:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    every = sorted({*small, *(number // d for d in small)})
    return ", ".join(map(str, every[-most:]))


def _resolve(path: str, given: dict[str, Any], world_size: int | None) -> RunFile:
    given = copy.deepcopy(given)
    for place, value in walk(given):
        if value == "auto" and not place.startswith(("_about", "vitds.")):  # our keys say themselves what they take
            raise UserError(f"{place}: 'auto' is for another trainer; write the value")
    ours = given.get("vitds", {})
    for module in typed(ours.get("plugins", []) if isinstance(ours, dict) else [], list[str], "vitds.plugins"):
        try:  # before the sections are read, which know only what is registered by then
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"vitds.plugins: {module!r} cannot be imported: {error}") from None
    section = parse(VitdsSection, ours, "vitds")
    if world_size is None:
        world_size = _fixed_world_size(given)
    else:
        check_world_size(section.cluster, world_size)

    deepspeed = {word: value for word, value in given.items() if word not in OURS}
    optimizer = deepspeed.pop("optimizer", copy.deepcopy(DEFAULT_OPTIMIZER))
    if isinstance(optimizer, dict):  # DeepSpeed takes its own names in any case
        own = {name.lower(): name for name in OWN_NAMES}
        optimizer["type"] = own.get(str(optimizer.get("type")).lower(), optimizer.get("type"))
    optimizer = check_optimizer(optimizer, other_optimizer_names())
    if "lr" not in optimizer["params"]:
        raise UserError("optimizer.params.lr: missing; the base learning rate, which the schedule multiplies")
    params = optimizer["params"]
    rates = {
        "lr": params["lr"],
        "weight_decay": params.get("weight_decay", 0.0),
        "head_weight_decay": params.get("head_weight_decay"),
    }
    scheduler = parse(SchedulerSection, given.get("scheduler", {}), "scheduler")
    monitors = monitor_sections(given)

    if isinstance(deepspeed.setdefault("zero_optimization", {}), dict):
        deepspeed["zero_optimization"].setdefault("stage", 2)
    deepspeed.setdefault("gradient_clipping", 1.0)
    check_deepspeed_section(deepspeed)
    check_compile_mode(section.train.compile, section.train.compile_mode, zero_stage(deepspeed))
    micro = deepspeed.get("train_micro_batch_size_per_gpu")
    global_batch = deepspeed.get("train_batch_size")
    if global_batch is None:
        if micro is None:
            raise UserError("train_batch_size: missing; the number of images in one optimizer step over all ranks")
        global_batch = micro * deepspeed.get("gradient_accumulation_steps", 1) * world_size
    micro, accumulation = batches(global_batch, micro, world_size)
    if deepspeed.get("gradient_accumulation_steps", accumulation) != accumulation:
        raise UserError(
            f"gradient_accumulation_steps: {deepspeed['gradient_accumulation_steps']} is not {global_batch} / ({micro} × {world_size}) = "
            f"{accumulation}; leave it out, it follows from train_batch_size and the number of ranks"
        )
    _resolve_accumulation_dtype(deepspeed)
    if bf16_masters(deepspeed):
        _check_bf16_masters(optimizer["type"], section)
    with torch.device("meta"):
        model = ViTForImageClassification(build_config(section.model))
    fit_buckets(deepspeed["zero_optimization"], [parameter.numel() for parameter in model.parameters()])
    deepspeed |= {"train_batch_size": global_batch, "train_micro_batch_size_per_gpu": micro}
    deepspeed.pop("gradient_accumulation_steps", None)
    resolved = {
        **({"_about": given["_about"]} if "_about" in given else {}),
        **deepspeed, "optimizer": optimizer, "scheduler": to_json(scheduler), **to_json(monitors), "vitds": to_json(section),
    }  # fmt: skip
    return RunFile(
        deepspeed, optimizer, rates, scheduler, monitors, section, global_batch, micro, accumulation, resolved
    )


def _fixed_world_size(given: dict[str, Any]) -> int:
    """The number of ranks that the batch sizes fix where all three are given; otherwise they allow 1."""
    words = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    sizes = [size for word in words if isinstance(size := given.get(word), int) and size > 0]
    return max(1, sizes[0] // (sizes[1] * sizes[2])) if len(sizes) == 3 else 1


def _check_bf16_masters(optimizer: str, section: VitdsSection) -> None:
    """bf16 masters are rounded stochastically, which other optimizers do not do."""
    if not issubclass(OPTIMIZERS.get(optimizer, object), LayoutOptimizer):
        ours = ", ".join(name for name, cls in OPTIMIZERS.items() if issubclass(cls, LayoutOptimizer))
        raise UserError(
            f"bf16.bf16_master_weights_and_grads: {optimizer} rounds to nearest, which loses updates smaller than half a bit; "
            f"these round stochastically: {ours}"
        )
    if section.ema.decay is not None:
        raise UserError(
            "vitds.ema.decay: not with bf16.bf16_master_weights_and_grads; the average is fp32 as its masters are"
        )


def _resolve_accumulation_dtype(deepspeed: dict[str, Any]) -> None:
    """Accumulate in fp32 unless told otherwise; at stage 0 in 16 bits DeepSpeed cannot."""
    half = str(precision(deepspeed)).removeprefix("torch.")
    types = deepspeed.setdefault("data_types", {})
    if types.get("grad_accum_dtype") is None:
        types["grad_accum_dtype"] = "fp32"
    accumulate = types["grad_accum_dtype"]
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[half]
    if zero_stage(deepspeed) == 0 and accumulate != short:
        raise UserError(
            f"data_types.grad_accum_dtype: ZeRO-0 cannot accumulate {short} gradients in {accumulate}; set zero_optimization.stage to 2 "
            f"(legal on one GPU), or accept {short} accumulation by data_types.grad_accum_dtype={short}"
        )
