"""One step of ModifiedAdafactor on a flat: sums, one all-reduce over the ranks, factors, weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vitds.dist import sum_over_ranks
from vitds.layout import Flat
from vitds.optim.factoring import Factored
from vitds.optim.kernels import elementwise, factored
from vitds.optim.kernels.tables import Slots, factor_tables, runs


class Tables:
    """What the kernels are told of a flat, made once.

    Args:
        flat: the flat.
        sections: its factored fragments.
        begins: index of each unfactored fragment -> its place in "exp_avg_sq".
        totals: elements of every whole parameter, fp32 (fragments,); None without clipping.
        seed: of the rounding.
    """

    def __init__(
        self, flat: Flat, sections: Sequence[Factored], begins: dict[int, int], totals: torch.Tensor | None, seed: int
    ) -> None:
        slots, device = Slots(), flat.tensor.device
        self.runs = runs(flat, seed, begins, slots)
        self.factors = factor_tables(flat, sections, seed, slots)
        self.slots, self.num_slots = slots.table(device), slots.count
        self.totals = totals


def step(
    tables: Tables, flat: Flat, grad: torch.Tensor, state: dict[str, Any], lr: float, decay: float, beta1: float,
    beta2: float, eps: float, bound: float | None,
) -> None:  # fmt: skip
    """One update, as vitds.optim.adafactor says; `bound` is the clipping threshold."""
    weights, moment, factors = flat.tensor, state["exp_avg"], state["exp_avg_sq_factors"]
    number, square = state["step"], state["exp_avg_sq"]
    means = factors
    if factors.numel():
        sums = torch.zeros_like(factors)
        factored.sum_squares(tables.factors, grad, sums)
        if flat.group is not None:
            sum_over_ranks(sums, flat.group)
        means = factored.finish(tables.factors, sums, factors, beta2, 1 - beta2, eps)
    clips = None
    if bound is not None:
        assert tables.totals is not None
        partials = torch.empty(tables.num_slots, device=grad.device)
        squares = torch.zeros(len(flat.fragments), device=grad.device)
        elementwise.step(
            elementwise.MEASURE, tables.runs, weights, grad, moment, number, lr, decay, beta1, 1 - beta1, square, beta2,
            1 - beta2, eps=eps, partials=partials,
        )  # fmt: skip
        factored.move_weights(
            tables.factors, weights, grad, moment, factors, means, number, lr, decay, beta1, 1 - beta1, partials
        )
        factored.add_slots(tables.slots, partials, squares)
        if flat.group is not None:
            sum_over_ranks(squares, flat.group)
        clips = (squares, tables.totals, bound)
    factored.move_weights(
        tables.factors, weights, grad, moment, factors, means, number, lr, decay, beta1, 1 - beta1, clips=clips
    )
    elementwise.step(
        elementwise.ADAFACTOR, tables.runs, weights, grad, moment, number, lr, decay, beta1, 1 - beta1, square, beta2,
        1 - beta2, eps=eps, clips=clips,
    )  # fmt: skip
