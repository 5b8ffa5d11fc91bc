"""What a forecast is made of: the job, the model, its micro batches, and how it is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from vitds.models import ViTConfig, ViTForImageClassification, build_config
from vitds.optim.groups import FLAT_ELEMENTS, build_groups
from vitds.planning.job import Job, block_of


@dataclass(frozen=True)
class Workload:
    """One rank's work in an optimizer step."""

    job: Job
    """What of it ranks share: parameters, groups, DeepSpeed's section, optimizer, activation checkpointing."""
    model: ViTConfig
    micro_batch: int
    accumulation: int = 1
    compiled: bool = False
    """Whether blocks are compiled."""
    ema: bool = False
    """Whether an average of the weights is kept beside the masters."""
    device: str = "cuda"
    """The kind of device it computes on: cuda or cpu."""

    @property
    def policy(self) -> str:
        """What blocks keep for the backward pass."""
        return self.job.policy

    @property
    def optimizer(self) -> str:
        """Its name."""
        return str(self.job.optimizer["type"])

    @property
    def precision_bytes(self) -> int:
        """Bytes of a number in the model's precision."""
        return self.job.weight_bytes

    @property
    def tokens(self) -> int:
        """Of one image, in the blocks."""
        return self.model.num_patches + (self.model.pool == "token")

    @cached_property
    def lowest(self) -> int:
        """The block that a backward pass comes to last: the lowest with a trained parameter, or with one below it (-1: what is
        before the blocks; `depth`: none of them)."""
        depth = self.model.depth
        return min((block_of(name, depth) for name in self.job.names), default=depth)

    @property
    def reached(self) -> float:
        """The part of the blocks that a backward pass comes to."""
        return (self.model.depth - max(self.lowest, 0)) / self.model.depth

    @cached_property
    def weights_trained(self) -> float:
        """The part of the kernels' elements that gradients are computed of."""
        sizes = {name: size for name, size in self.job.sizes.items() if len(self.job.shapes[name]) > 1}
        return sum(size for name, size in sizes.items() if name in self.job.names) / sum(sizes.values())

    @property
    def images(self) -> int:
        """Images of one rank in a step."""
        return self.micro_batch * self.accumulation

    def with_micro_batch(self, size: int) -> Workload:
        """The same images a step, otherwise cut.

        Raises:
            ValueError: it does not divide them.
        """
        if size < 1 or self.images % size:
            raise ValueError(f"a micro batch of {size} does not divide {self.images} images")
        return replace(self, micro_batch=size, accumulation=self.images // size)

    def with_policy(self, policy: str) -> Workload:
        """The same with other activation checkpointing."""
        return replace(self, job=replace(self.job, policy=policy))

    def with_optimizer(self, name: str, **params: Any) -> Workload:
        """The same with another optimizer."""
        return replace(self, job=replace(self.job, optimizer={"type": name, "params": params}))


def workload_of(run_file: Any, device: str = "cuda", vit: ViTForImageClassification | None = None) -> Workload:
    """A loaded run file's (vitds.config.RunFile, which lives on a higher floor), with its own number of ranks.

    Args:
        vit: its model on the meta device, where there is one already.
    """
    part = run_file.vitds
    config = build_config(part.model) if vit is None else vit.config
    job = job_of(
        config, run_file.optimizer, run_file.deepspeed, policy=part.train.activation_checkpointing,
        rates=run_file.rates, overrides=part.groups, vit=vit,
    )  # fmt: skip
    return Workload(
        job, config, run_file.micro_batch, run_file.accumulation, part.train.compile, part.ema.decay is not None, device,
    )  # fmt: skip


def workload_of_shape(
    model: ViTConfig,
    optimizer: Mapping[str, Any],
    section: Mapping[str, Any],
    *,
    micro_batch: int,
    accumulation: int = 1,
    policy: str = "none",
    compiled: bool = False,
    device: str = "cuda",
    flat_elements: int = FLAT_ELEMENTS,
    overrides: Sequence[Any] = (),
) -> Workload:
    """That of a shape, without a run file.

    Args:
        optimizer: type and params.
        section: DeepSpeed's half of a run file, as resolved.
        overrides: `vitds.groups` of a run file.
    """
    job = replace(job_of(model, optimizer, section, policy=policy, overrides=overrides), flat_elements=flat_elements)
    return Workload(job, model, micro_batch, accumulation, compiled, device=device)


def job_of(
    model: ViTConfig,
    optimizer: Mapping[str, Any],
    section: Mapping[str, Any],
    *,
    policy: str = "none",
    rates: Mapping[str, Any] | None = None,
    overrides: Sequence[Any] = (),
    vit: ViTForImageClassification | None = None,
) -> Job:
    """What of a model and its settings the ranks share; the groups are those that the engine makes.

    Args:
        rates: lr, weight_decay and head_weight_decay; they make no difference here but for a group that a rate makes.
        overrides: `vitds.groups` of the run file.
    """
    if vit is None:
        with torch.device("meta"):
            vit = ViTForImageClassification(model)
    given = rates or {"lr": 1.0, "weight_decay": 0.03, "head_weight_decay": 3.0}
    groups = build_groups(vit.shapes, **given, decay_patterns=vit.decay_patterns(), overrides=overrides)
    names = tuple(group.names for group in groups if not group.frozen)
    return Job(vit.shapes, vit.factored_views(), names, section, optimizer, policy)
