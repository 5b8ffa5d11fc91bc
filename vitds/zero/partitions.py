"""What this rank holds of every parameter, under every wrapper DeepSpeed puts around an optimizer.

DeepSpeed has no hook that tells an optimizer the shapes behind its flat buffers, so they are read off the wrapper's own
attributes once, right after it is built, and proved there: fragments tile every parameter exactly, and each master
fragment holds the same numbers as the 16-bit weight it belongs to. Besides norm.py and lean.py no other module touches a
private attribute of DeepSpeed. Its own `safe_get_*` and `_hp_mapping` are not used: they return other parameters' values under
`round_robin_gradients` (docs/LOG.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as torch_dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from vitds import dist
from vitds.layout import Flat, Fragment, Shard

TESTED_VERSIONS = ("0.19.8",)

Shapes = dict[str, tuple[int, ...]]


def check_version() -> None:
    """Refuse a DeepSpeed whose private layout was never proved with this code."""
    if deepspeed.__version__.split("+")[0] not in TESTED_VERSIONS:
        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__} was never tested with this vitds; install deepspeed=={TESTED_VERSIONS[-1]}"
        )


class Partitions:
    """The flats of a built engine on this rank, and the ways between masters and weights.

    Args:
        engine: what `deepspeed.initialize` returned.
        shapes: logical shape of every parameter (a ZeRO-3 parameter no longer knows its own).
        views: shape in which a factored optimizer sees each parameter; default its own shape.
    """

    def __init__(self, engine: Any, shapes: Shapes, views: Shapes) -> None:
        check_version()
        self.wrapper = engine.optimizer
        self.parameters: dict[str, torch.nn.Parameter] = dict(engine.module.named_parameters())
        self.shapes, self.views = shapes, views
        self.sharded_weights = isinstance(self.wrapper, DeepSpeedZeroOptimizer_Stage3)
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.flats: list[Flat] = list(self._read(names))
        trained = {fragment.name for flat in self.flats for fragment in flat.fragments}
        self.frozen: list[Flat] = [self._frozen_flat(name) for name in self.parameters if name not in trained]
        self._assert_tiling()

    def master_shards(self) -> list[Shard]:
        """This rank's part of every master weight, frozen parameters (always fp32) included, as live views."""
        return [
            Shard(
                fragment.name,
                fragment.shape,
                fragment.of(flat.tensor.detach()),
                fragment.start,
                flat.group,
                replicated=flat.group is None,
            )
            for flat in [*self.flats, *self.frozen]
            for fragment in flat.fragments
        ]

    def refresh_weights(self) -> None:
        """Make the weights the model computes with equal to the masters after rounding. Collective.

        To be called after every write into `master_shards()`.
        """
        wrapper = self.wrapper
        with torch.no_grad():
            if isinstance(wrapper, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
                wrapper.update_lp_params()
            elif isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
                wrapper.checkpoint_event_prologue()
                for sub_group in range(len(wrapper.fp32_partitioned_groups_flat)):
                    wrapper._reassign_or_swap_out_partitioned_parameters(sub_group)
            elif isinstance(wrapper, (FP16_UnfusedOptimizer, FP16_Optimizer)):
                for flat in self.flats:
                    for fragment in flat.fragments:
                        self.parameters[fragment.name].data.view(-1).copy_(fragment.of(flat.tensor))
            for flat in self.frozen:
                self._refresh_frozen(flat)
            if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
                wrapper.checkpoint_event_epilogue()

    def assert_masters_equal_weights(self) -> None:
        """Each master fragment, rounded, is the very slice of the weights it claims to be."""
        for flat in [*self.flats, *self.frozen]:
            for fragment in flat.fragments:
                weight = self._local_weight(fragment)
                master = fragment.of(flat.tensor.detach()).to(weight.device, weight.dtype)
                assert torch.equal(master, weight), (
                    f"{fragment.name}[{fragment.start}:{fragment.start + fragment.numel}] on rank {dist.rank()}: the master "
                    f"weights found through {type(self.wrapper).__name__} are not this parameter's"
                )

    def _local_weight(self, fragment: Fragment) -> torch.Tensor:
        """The slice of the model's own weight that belongs to a fragment. (numel,)"""
        parameter: Any = self.parameters[fragment.name]
        if self.sharded_weights:
            return parameter.ds_tensor.data.view(-1)[: fragment.numel]
        return parameter.data.view(-1)[fragment.start : fragment.start + fragment.numel]

    def _fragment(self, name: str, start: int, numel: int, offset: int) -> Fragment:
        shape = tuple(self.shapes[name])
        return Fragment(name, shape, tuple(self.views.get(name, shape)), start, max(numel, 0), offset)

    def _read(self, names: dict[int, str]) -> Iterator[Flat]:
        """The flats of each kind of wrapper, in the order in which it steps them."""
        wrapper = self.wrapper
        if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
            for parameters, flat, group in zip(
                wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, wrapper.sub_group_process_groups, strict=True
            ):
                rank, offset, fragments = torch_dist.get_rank(group), 0, []
                for parameter in parameters:
                    step, total = parameter.partition_numel(), parameter.ds_numel
                    start = min(rank * step, total)
                    fragments.append(self._fragment(names[id(parameter)], start, min(step, total - start), offset))
                    offset += step
                yield Flat(flat, tuple(fragments), group)
        elif isinstance(wrapper, DeepSpeedZeroOptimizer):
            for i, flat in enumerate(wrapper.single_partition_of_fp32_groups):
                # The physical order, which `round_robin_gradients` makes another one than the logical order.
                placed = zip(wrapper.round_robin_bit16_groups[i], wrapper.round_robin_bit16_offsets[i], strict=True)
                yield self._cut(flat, [(names[id(p)], start) for p, start in placed], wrapper.real_dp_process_group[i])
        elif isinstance(wrapper, BF16_Optimizer):
            for i, flat in enumerate(wrapper.fp32_groups_flat_partition):
                yield self._cut(flat, _in_sequence(wrapper.bf16_groups[i], names), wrapper.real_dp_process_group[i])
        elif isinstance(wrapper, FP16_Optimizer):
            for parameters, flat in zip(wrapper.fp16_groups, wrapper.fp32_groups_flat, strict=True):
                placed_whole = _in_sequence(parameters, names)
                yield Flat(flat, tuple(self._fragment(n, 0, math.prod(self.shapes[n]), at) for n, at in placed_whole))
        elif isinstance(wrapper, FP16_UnfusedOptimizer):
            for parameters, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
                for parameter, master in zip(parameters, masters, strict=True):
                    yield Flat(master, (self._fragment(names[id(parameter)], 0, master.numel(), 0),))
        elif isinstance(wrapper, torch.optim.Optimizer):
            for group in wrapper.param_groups:
                for parameter in group["params"]:
                    yield Flat(parameter, (self._fragment(names[id(parameter)], 0, parameter.numel(), 0),))
        else:
            raise RuntimeError(
                f"DeepSpeed wrapped the optimizer in {type(wrapper).__name__}, whose layout is not known here"
            )

    def _cut(self, flat: torch.Tensor, placed: list[tuple[str, int]], group: Any) -> Flat:
        """One rank's equal share of a buffer in which parameters lie at known starts."""
        low = torch_dist.get_rank(group) * flat.numel()
        high = low + flat.numel()
        fragments = []
        for name, at in placed:
            total = math.prod(self.shapes[name])
            first, last = max(at, low), min(at + total, high)
            if first < last:
                fragments.append(self._fragment(name, first - at, last - first, first - low))
            else:
                fragments.append(self._fragment(name, 0, 0, 0))
        return Flat(flat, tuple(fragments), group)

    def _frozen_flat(self, name: str) -> Flat:
        """A frozen parameter's fp32 values, which no optimizer keeps: cut evenly over the ranks, in host memory."""
        total, ranks, rank = math.prod(self.shapes[name]), dist.world_size(), dist.rank()
        step = math.ceil(total / ranks)
        start = min(rank * step, total)
        fragment = self._fragment(name, start, min(step, total - start), 0)
        group = torch_dist.group.WORLD if ranks > 1 else None
        return Flat(self._local_weight(fragment).detach().to("cpu", torch.float32, copy=True), (fragment,), group)

    def _refresh_frozen(self, flat: Flat) -> None:
        (fragment,) = flat.fragments
        self._local_weight(fragment).copy_(flat.tensor)
        if not self.sharded_weights and flat.group is not None:
            weight = self.parameters[fragment.name].data.view(-1)
            step = math.ceil(fragment.total / dist.world_size())
            for source in range(dist.world_size()):
                piece = weight[source * step : (source + 1) * step]
                if piece.numel():
                    torch_dist.broadcast(piece, source, group=flat.group)

    def _assert_tiling(self) -> None:
        """Over the ranks, fragments cover each parameter once: their lengths and the sums of their indices add up."""
        for flat in [*self.flats, *self.frozen]:
            found = torch.tensor(
                [[f.numel, f.numel * (2 * f.start + f.numel - 1)] for f in flat.fragments], dtype=torch.int64
            )
            if flat.group is not None:
                found = dist.sum_over_ranks(found.to(dist.device()), flat.group).cpu()
            expected = torch.tensor([[f.total, f.total * (f.total - 1)] for f in flat.fragments], dtype=torch.int64)
            assert torch.equal(found, expected), (
                f"fragments do not tile: {[f.name for f, a, b in zip(flat.fragments, found, expected, strict=True) if any(a != b)]}"
            )


def _in_sequence(parameters: list[torch.nn.Parameter], names: dict[int, str]) -> list[tuple[str, int]]:
    placed, offset = [], 0
    for parameter in parameters:
        placed.append((names[id(parameter)], offset))
        offset += parameter.numel()
    return placed


def loss_scaler_state(engine: Any) -> dict[str, float]:
    """The moving parts of fp16's dynamic loss scale; empty where there is none."""
    scaler = _loss_scaler(engine)
    return {key: getattr(scaler, key) for key in _SCALER_KEYS if hasattr(scaler, key)} if scaler is not None else {}


def restore_loss_scaler(engine: Any, state: dict[str, float]) -> None:
    """Put back what `loss_scaler_state` returned."""
    scaler = _loss_scaler(engine)
    for key, value in state.items():
        if scaler is not None and hasattr(scaler, key):
            setattr(scaler, key, value)


@contextmanager
def without_update(engine: Any) -> Iterator[None]:
    """While open, the engine's step only clears the accumulated gradient: the optimizer inside does nothing, and the
    loss scale is put back."""
    optimizer, loss_scale = engine.basic_optimizer, loss_scaler_state(engine)
    optimizer.__dict__["step"] = lambda *_, **__: None
    try:
        yield
    finally:
        del optimizer.__dict__["step"]
        restore_loss_scaler(engine, loss_scale)


_SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _loss_scaler(engine: Any) -> Any:
    if not engine.fp16_enabled():
        return None
    return getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)
