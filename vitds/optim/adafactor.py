"""The modified Adafactor of "Scaling Vision Transformers" (arXiv 2106.04560, §3.4), exact under ZeRO."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from vitds.dist import sum_over_ranks
from vitds.layout import Flat, Shard
from vitds.optim.base import LayoutOptimizer, check_range, chunk_of, laid_out_like, widened
from vitds.optim.factoring import Factored, as_slabs, factoring_of, pieces_of


@dataclass
class Unfactored:
    """Neighbouring elements without factors: at `offset` of the flat and `begin` of "exp_avg_sq"."""

    index: int
    offset: int
    begin: int
    numel: int


@dataclass
class Plan:
    """What is done with a flat, worked out once."""

    factored: list[Factored] = field(default_factory=list)
    unfactored: list[Unfactored] = field(default_factory=list)
    begins: dict[int, int] = field(default_factory=dict)
    """Fragment index -> its place in "exp_avg_sq", for the unfactored."""
    num_factors: int = 0
    num_unfactored: int = 0
    chunk: int = 0
    largest_piece: int = 0
    totals: torch.Tensor | None = None
    """Elements of every whole parameter of the flat, at least 1, fp32 (fragments,) on its device; for clipping."""


class ModifiedAdafactor(LayoutOptimizer):
    """Adafactor with bf16 momentum and no parameter scaling: little more than 2 bytes of state a parameter.

    With t = 1, 2, …, β2 = min(beta2_cap, 1 − t^−decay_rate) and S = g² + eps, for a parameter seen in its `view`,
    d0 its largest and d1 its second largest axis, all other axes batch axes:

        R ← β2·R + (1 − β2)·mean_d0(S)          C ← β2·C + (1 − β2)·mean_d1(S)
        U = g · (R / mean_d1(R))^−½ · C^−½
        U ← U / max(1, RMS(U)/clipping_threshold)          if there is one
        m ← beta1·m + (1 − beta1)·U                        fp32, stored rounded to bf16, applied unrounded
        θ ← θ − lr·(m + weight_decay·θ)

    If d1 has fewer than `min_dim_size_to_factor` elements: V ← β2·V + (1 − β2)·S, U = g·V^−½. Nothing is debiased.

    A parameter may be cut at any element over the ranks of `Flat.group`: sums of squares are taken over what is here
    and added up by one all-reduce per flat. R and C are the same on every rank; everything else is local.

    Args:
        params: parameters or group dicts; "views" gives the shapes to factor in, see `LayoutOptimizer`.
        lr: learning rate.
        beta1: momentum, in [0, 1). (The reference's literal rounds to 0.8984375.)
        beta2_cap: upper bound of β2, in [0, 1); lower it, say to 0.95, against instabilities.
        decay_rate: exponent of β2's growth, ≥ 0.
        eps: added to the squared gradient, > 0.
        min_dim_size_to_factor: least size of the second largest axis at which a parameter is factored.
        clipping_threshold: bound on the RMS of a parameter's update; None (the paper's choice): none.
        weight_decay: decoupled, scaled by lr.
        rounding_seed: see `LayoutOptimizer`.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2_cap: float = 0.999,
        decay_rate: float = 0.8,
        eps: float = 1e-30,
        min_dim_size_to_factor: int = 32,
        clipping_threshold: float | None = None,
        weight_decay: float = 0.0,
        rounding_seed: int = 0,
    ) -> None:
        check_range("beta1", beta1, 0, 1)
        check_range("beta2_cap", beta2_cap, 0, 1)
        check_range("decay_rate", decay_rate, 0)
        check_range("eps", eps, 1e-37)  # an fp32 zero would make 0/0 of a zero gradient
        check_range("min_dim_size_to_factor", min_dim_size_to_factor, 1)
        if clipping_threshold is not None:
            check_range("clipping_threshold", clipping_threshold, 1e-12)
        self.beta1, self.beta2_cap, self.decay_rate, self.eps = beta1, beta2_cap, decay_rate, eps
        self.min_dim_size_to_factor, self.clipping_threshold = min_dim_size_to_factor, clipping_threshold
        self._plans: dict[int, Plan] = {}
        super().__init__(params, lr=lr, weight_decay=weight_decay, rounding_seed=rounding_seed)

    def bind(self, flats: list[Flat]) -> None:
        super().bind(flats)
        self._plans = {}

    def beta2(self, step: int) -> float:
        """β2 of update number `step`, counted from 1: 0 at the first, the cap (0.999) from 5624 on."""
        return min(self.beta2_cap, 1 - step**-self.decay_rate)

    def _new_state(self, flat: Flat) -> dict[str, torch.Tensor]:
        plan, device = self._plan_of(flat), flat.tensor.device
        return {
            "exp_avg": torch.zeros_like(flat.tensor, dtype=self.momentum_dtype),
            "exp_avg_sq": torch.zeros(plan.num_unfactored, device=device),
            "exp_avg_sq_factors": torch.zeros(plan.num_factors, device=device),
        }

    def _plan_of(self, flat: Flat) -> Plan:
        if id(flat.tensor) in self._plans:
            return self._plans[id(flat.tensor)]
        plan = self._plans[id(flat.tensor)] = Plan(chunk=chunk_of(flat))
        if self.clipping_threshold is not None:
            totals = [float(max(1, fragment.total)) for fragment in flat.fragments]
            plan.totals = torch.tensor(totals, device=flat.tensor.device)
        for index, fragment in enumerate(flat.fragments):
            axes = factoring_of(fragment.view, self.min_dim_size_to_factor)
            if axes is not None:
                pieces = list(pieces_of(axes, fragment.start, fragment.numel, plan.chunk))
                plan.factored.append(Factored(index, fragment, axes, pieces, plan.num_factors))
                plan.num_factors = plan.factored[-1].end
                plan.largest_piece = max([plan.largest_piece, *(max(p.numel, axes.slab) for p in pieces)])
                continue
            plan.begins[index] = plan.num_unfactored
            last = plan.unfactored[-1] if plan.unfactored and self.clipping_threshold is None else None
            if last is not None and last.offset + last.numel == fragment.offset:
                last.numel += fragment.numel  # a flat of biases and norms is one run, not a thousand
            else:
                plan.unfactored.append(Unfactored(index, fragment.offset, plan.num_unfactored, fragment.numel))
            plan.num_unfactored += fragment.numel
        plan.largest_piece = max([plan.largest_piece, *(min(run.numel, plan.chunk) for run in plan.unfactored)])
        return plan

    def _update(self, flat: Flat, grad: torch.Tensor, state: dict[str, Any], lr: float, weight_decay: float) -> None:
        plan = self._plan_of(flat)
        buffers = torch.empty(2, plan.largest_piece, device=grad.device)
        self._accumulate(plan, flat, grad, state, buffers)
        scales = None
        if self.clipping_threshold is not None:
            scales = self._clipping_scales(plan, flat, grad, state, buffers)
        weights, exp_avg = flat.tensor.view(-1), state["exp_avg"].view(-1)
        for index, offset, update in self._updates(plan, grad, state, buffers):
            if scales is not None:
                update.mul_(scales[index])
            weight, m = weights[offset : offset + len(update)], exp_avg[offset : offset + len(update)]
            w = widened(weight)
            m32 = buffers[1, : len(update)].copy_(m).lerp_(update, 1 - self.beta1)
            m.copy_(m32)
            if weight_decay:
                m32.add_(w, alpha=weight_decay)
            w.add_(m32, alpha=-lr)
            self._keep(flat, state, offset, weight, w)

    def _update_whole(
        self, flat: Flat, grad: torch.Tensor, state: dict[str, Any], lr: float, weight_decay: float
    ) -> None:
        from vitds.optim.kernels import adafactor

        if id(flat.tensor) not in self._tables:
            plan = self._plan_of(flat)
            self._tables[id(flat.tensor)] = adafactor.Tables(
                flat, plan.factored, plan.begins, plan.totals, self.rounding_seed
            )
        adafactor.step(
            self._tables[id(flat.tensor)], flat, grad, state, lr, weight_decay, self.beta1, self.beta2(state["step"]),
            self.eps, self.clipping_threshold,
        )  # fmt: skip

    def _accumulate(
        self, plan: Plan, flat: Flat, grad: torch.Tensor, state: dict[str, Any], buffers: torch.Tensor
    ) -> None:
        """Brings the second moment up to date: sums over what is here, one all-reduce, the moving average."""
        new_weight = 1 - self.beta2(state["step"])
        for run in plan.unfactored:
            values = state["exp_avg_sq"][run.begin : run.begin + run.numel]
            for v, g in zip(values.split(plan.chunk), _part(grad, run).split(plan.chunk), strict=True):
                v.mul_(1 - new_weight).addcmul_(g, g, value=new_weight).add_(new_weight * self.eps)
        if not plan.factored:
            return
        sums = torch.zeros_like(state["exp_avg_sq_factors"])
        for part in plan.factored:
            over_y, over_x, values = part.over_y(sums), part.over_x(sums), part.fragment.of(grad)
            for piece in part.pieces:
                g = as_slabs(part.axes, piece, values, buffers[1, : part.axes.slab])
                square = torch.mul(g, g, out=buffers[0, : g.numel()].view(g.shape))
                batch, x = slice(piece.batch, piece.batch + piece.num_batch), slice(piece.x, piece.x + piece.num_x)
                torch.sum(square, 3, out=over_y[batch, x])  # a slab is in one piece only
                if piece.num_x == part.axes.x:
                    torch.sum(square, 1, out=over_x[batch])
                else:
                    over_x[batch].add_(square.sum(1))
        if flat.group is not None:
            sum_over_ranks(sums, flat.group)
        sections = [s for part in plan.factored for s in (sums[part.begin : part.middle], sums[part.middle : part.end])]
        torch._foreach_mul_(sections, [1 / n for part in plan.factored for n in (part.axes.y, part.axes.x)])
        state["exp_avg_sq_factors"].lerp_(sums.add_(self.eps), new_weight)

    def _updates(
        self, plan: Plan, grad: torch.Tensor, state: dict[str, Any], buffers: torch.Tensor
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """U of the flat, piece by piece: (index of the fragment, offset in the flat, values in the first buffer)."""
        for part in plan.factored:
            if not part.pieces:
                continue
            axes, values = part.axes, part.fragment.of(grad)
            first, last = part.pieces[0].batch, part.pieces[-1].batch + part.pieces[-1].num_batch
            # mean_d1(R) is the mean of S over both axes, so it may be taken on either factor
            over_y = part.over_y(state["exp_avg_sq_factors"])[first:last]
            over_y = (over_y / over_y.mean(1, keepdim=True)).rsqrt_().unsqueeze(3)  # (batch, x, middle, 1, trailing)
            over_x = part.over_x(state["exp_avg_sq_factors"])[first:last]
            over_x = over_x.rsqrt().unsqueeze(1)  # (batch, 1, middle, y, trailing)
            for piece in part.pieces:
                g = as_slabs(axes, piece, values, buffers[1, : axes.slab])
                batch = slice(piece.batch - first, piece.batch - first + piece.num_batch)
                update = torch.mul(g, over_x[batch], out=buffers[0, : g.numel()].view(g.shape))
                # one root after the other: their product overflows where a gradient is all zeros
                update.mul_(over_y[batch, piece.x : piece.x + piece.num_x])
                flat_update = update.view(-1)[piece.cut : piece.cut + piece.numel]
                yield part.index, part.fragment.offset + piece.offset, flat_update
        for run in plan.unfactored:
            for begin in range(0, run.numel, plan.chunk):
                size = min(plan.chunk, run.numel - begin)
                v = state["exp_avg_sq"][run.begin + begin : run.begin + begin + size]
                offset = run.offset + begin
                yield run.index, offset, torch.rsqrt(v, out=buffers[0, :size]).mul_(grad[offset : offset + size])

    def _clipping_scales(
        self, plan: Plan, flat: Flat, grad: torch.Tensor, state: dict[str, Any], buffers: torch.Tensor
    ) -> torch.Tensor:
        """1 / max(1, RMS(U)/threshold) of every whole parameter of the flat, (fragments,)."""
        assert self.clipping_threshold is not None and plan.totals is not None
        squares = torch.zeros(len(flat.fragments), device=grad.device)
        for index, _, update in self._updates(plan, grad, state, buffers):
            squares[index] += torch.dot(update, update)
        if flat.group is not None:
            sum_over_ranks(squares, flat.group)
        return (squares / plan.totals).sqrt_().div_(self.clipping_threshold).clamp_(min=1).reciprocal_()

    def _shards_of(self, flat: Flat, state: dict[str, Any]) -> list[Shard]:
        plan = self._plan_of(flat)
        shards = laid_out_like(flat, "exp_avg", state["exp_avg"])
        for part in plan.factored:
            factors, name, axes = state["exp_avg_sq_factors"], part.fragment.name, part.axes
            over = (factors[part.begin : part.middle], factors[part.middle : part.end])
            row, col = over if axes.row_is_over_y else over[::-1]
            shards.append(Shard(f"{name}.exp_avg_sq_row", axes.row_shape, row, 0, flat.group, replicated=True))
            shards.append(Shard(f"{name}.exp_avg_sq_col", axes.col_shape, col, 0, flat.group, replicated=True))
        for index, begin in plan.begins.items():
            f = flat.fragments[index]
            data = state["exp_avg_sq"][begin : begin + f.numel]
            shards.append(Shard(f"{f.name}.exp_avg_sq", f.shape, data, f.start, flat.group, flat.group is None))
        return shards


def _part(values: torch.Tensor, run: Unfactored) -> torch.Tensor:
    return values[run.offset : run.offset + run.numel]
