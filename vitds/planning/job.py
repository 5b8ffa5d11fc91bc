"""The words of planning: what of a run file decides about communication, and one kind of message that comes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from vitds.optim.groups import FLAT_ELEMENTS, flats_of

BYTES = {"fp32": 4, "float32": 4, "fp16": 2, "float16": 2, "half": 2, "bf16": 2, "bfp16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Traffic:
    """One kind of message of one optimizer step, the same on every rank."""

    what: str
    """gradients, weights, second moments or scalars."""
    kind: str
    """all_reduce, reduce, reduce_scatter or all_gather."""
    payload: int
    """Bytes handed to the collective: the whole tensor, so the input of a reduce-scatter and the output of an all-gather."""
    calls: int
    """Number of collectives; a lower bound where every owner gets a reduce of its own."""
    ranks: int
    """How many take part."""
    when: str = "step"
    """forward, backward (what it can hide behind), or step: after the last backward."""

    @property
    def wire(self) -> float:
        """Bytes that a rank sends, which are as many as it receives, by the ring algorithms.

        Patarasuk and Yuan, 2009, "Bandwidth optimal all-reduce": reduce-scatter and all-gather send (n − 1)/n of the tensor,
        an all-reduce is one after the other; in a ring that reduces to one rank, each but that one passes the tensor on.
        """
        share = (self.ranks - 1) / self.ranks
        return self.payload * {"all_reduce": 2 * share, "reduce": share}.get(self.kind, share)


@dataclass(frozen=True)
class Job:
    """What of a run file decides about communication."""

    shapes: Mapping[str, tuple[int, ...]]
    """Every parameter's shape, in the model's order."""
    views: Mapping[str, tuple[int, ...]]
    """The shape in which a factored optimizer sees it."""
    groups: tuple[tuple[str, ...], ...]
    """Names of the trained parameters, by optimizer group."""
    section: Mapping[str, Any]
    """DeepSpeed's half of the run file."""
    optimizer: Mapping[str, Any]
    """type and params."""
    policy: str = "none"
    """vitds.train.activation_checkpointing."""
    flat_elements: int = FLAT_ELEMENTS
    """Largest flat of a rank at stages 1 and 2."""

    def flats(self, ranks: int) -> list[tuple[str, ...]]:
        """What lies in each tensor that the optimizer steps: a group, cut into flats of limited size; at stage 3 it is
        DeepSpeed that cuts, after `sub_group_size` of a rank's elements."""
        sizes = self.sizes
        if self.stage < 3:
            cut = (flats_of(group, sizes, ranks, self.flat_elements) for group in self.groups)
            return [flat for group in cut for flat in group]
        limit, flats = int(self.zero.get("sub_group_size", 1e9)), list[tuple[str, ...]]()
        for group in self.groups:
            flat, held = list[str](), 0
            for name in group:
                flat.append(name)
                held += math.ceil(sizes[name] / ranks)
                if held >= limit:
                    flats.append(tuple(flat))
                    flat, held = [], 0
            flats += [tuple(flat)] if flat else []
        return flats

    def at_stage(self, stage: int, **zero: Any) -> Job:
        """The same job at another ZeRO stage, with other keys of `zero_optimization`."""
        return replace(self, section={**self.section, "zero_optimization": {**self.zero, "stage": stage, **zero}})

    @property
    def zero(self) -> dict[str, Any]:
        """The section zero_optimization."""
        return dict(self.section.get("zero_optimization", {}))

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return int(self.zero.get("stage", 0))

    @property
    def half(self) -> bool:
        """Whether the model computes in 16 bits."""
        return any(self.section.get(word, {}).get("enabled") for word in ("bf16", "fp16"))

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight in the precision in which it is gathered."""
        return 2 if self.half else 4

    @property
    def gradient_bytes(self) -> int:
        """Bytes of a gradient on its way: `communication_data_type`, else the model's precision."""
        return BYTES[str(self.section.get("communication_data_type") or ("bf16" if self.half else "fp32"))]

    @property
    def whole_gradients(self) -> bool:
        """Stage 1 in bf16 with fp32 sums: DeepSpeed's BF16_Optimizer, which reduces whole flats after the last backward."""
        sums = str(self.section.get("data_types", {}).get("grad_accum_dtype") or "")
        return self.stage == 1 and bool(self.section.get("bf16", {}).get("enabled")) and BYTES.get(sums, 0) == 4

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Elements of every parameter."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    @cached_property
    def names(self) -> frozenset[str]:
        """The parameters that are trained."""
        return frozenset(name for group in self.groups for name in group)

    @property
    def trained(self) -> int:
        """Ψ: their elements."""
        sizes = self.sizes
        return sum(sizes[name] for name in self.names)

    @property
    def hpz(self) -> int:
        """zero_hpz_partition_size."""
        return int(self.zero.get("zero_hpz_partition_size", 1)) if self.stage == 3 else 1


def block_of(name: str, depth: int) -> int:
    """In which block a parameter is: `depth` behind them, -1 before."""
    if name.startswith("blocks."):
        return int(name.split(".")[1])
    return -1 if name.startswith(("patch_embed", "pos_embed", "cls_token")) else depth
