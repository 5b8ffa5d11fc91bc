"""The factored parameters of a flat: sums of squares in one pass, factors finished, weights moved in a second pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vitds.optim.kernels import bits, launch
from vitds.optim.kernels.device import move, nearest, stream_of, widened
from vitds.optim.kernels.tables import ALIGN, COLUMNS, FACTOR_RECORD, GATHERED, SUM_RECORD, TILE_RECORD, FactorTables

ROWS_TO_SUM, ROWS_TO_MOVE = 32, 16
"""Rows of a tile that a program works on at a time."""


@triton.jit
def _sum_tiles(
    table: tl.tensor, grad: tl.tensor, partials: tl.tensor,
    ALIGNED: tl.constexpr, UNIT: tl.constexpr, RECORD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:  # fmt: skip
    """Σ g² of a tile's rows and of its columns."""
    record = table + tl.program_id(0).to(tl.int64) * RECORD
    place, element = tl.load(record), tl.load(record + 1)
    rows, columns = tl.load(record + 2).to(tl.int32), tl.load(record + 3).to(tl.int32)
    stride, spacing = tl.load(record + 4).to(tl.int32), tl.load(record + 5).to(tl.int32)
    between = tl.load(record + 8).to(tl.int32)
    to_rows, to_columns = tl.load(record + 10), tl.load(record + 11)
    start, end = tl.load(record + 12), tl.load(record + 13)
    if ALIGNED:
        place, stride, columns = (
            tl.multiple_of(place, ALIGN), tl.multiple_of(stride, ALIGN), tl.multiple_of(columns, ALIGN)
        )  # fmt: skip
    y = tl.arange(0, COLUMNS)
    along = y if UNIT else y * spacing
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, rows, ROWS):
        x = first + tl.arange(0, ROWS)
        at = (x * stride)[:, None] + along[None, :]
        mask = (x < rows)[:, None] & (y < columns)[None, :]
        if not ALIGNED:
            mask = mask & (element + at >= start) & (element + at < end)
        g = tl.where(mask, widened(tl.load(grad + place + at, mask=mask)), 0.0)
        total += g * g
        tl.store(partials + to_rows + x * between, tl.sum(g * g, axis=1), mask=x < rows)
    tl.store(partials + to_columns + along, tl.sum(total, axis=0), mask=y < columns)


@triton.jit
def _gather(
    table: tl.tensor, partials: tl.tensor, sums: tl.tensor, RECORD: tl.constexpr, OUTPUTS: tl.constexpr
) -> None:
    """Partial sums of the same factors, one after the other."""
    record = table + tl.program_id(0).to(tl.int64) * RECORD
    begin, to, terms = tl.load(record), tl.load(record + 1), tl.load(record + 2).to(tl.int32)
    stride, outputs = tl.load(record + 3), tl.load(record + 4)
    lane = tl.arange(0, OUTPUTS)
    total = tl.zeros((OUTPUTS,), dtype=tl.float32)
    for term in range(terms):
        total += tl.load(partials + begin + term * stride + lane, mask=lane < outputs, other=0.0)
    tl.store(sums + to + lane, total, mask=lane < outputs)


@triton.jit
def _finish(
    table: tl.tensor, sums: tl.tensor, factors: tl.tensor, means: tl.tensor, keep: tl.tensor, new: tl.tensor, eps: tl.tensor,
    RECORD: tl.constexpr, COUNT: tl.constexpr,
) -> None:  # fmt: skip
    """Moving averages of the means of squares, and the mean over x of those over y."""
    record = table + tl.program_id(0).to(tl.int64) * RECORD
    begin, stride, count = tl.load(record), tl.load(record + 1), tl.load(record + 2).to(tl.int32)
    divisor, mean = tl.load(record + 3).to(tl.float32), tl.load(record + 4)
    total = tl.zeros((COUNT,), dtype=tl.float32)
    for first in range(0, count, COUNT):
        lane = first + tl.arange(0, COUNT)
        at, mask = begin + lane * stride, lane < count
        factor = keep * tl.load(factors + at, mask=mask, other=0.0)
        factor += new * (tl.load(sums + at, mask=mask, other=0.0) / divisor + eps)
        tl.store(factors + at, factor, mask=mask)
        total += tl.where(mask, factor, 0.0)
    if mean >= 0:
        tl.store(means + mean, tl.sum(total) / count)


@triton.jit(do_not_specialize=["step"])
def _move_tiles(
    table: tl.tensor, weights: tl.tensor, grad: tl.tensor, moment: tl.tensor, factors: tl.tensor, means: tl.tensor, partials: tl.tensor, squares: tl.tensor,
    totals: tl.tensor, step: tl.tensor, lr: tl.tensor, decay: tl.tensor, keep1: tl.tensor, new1: tl.tensor, bound: tl.tensor,
    ALIGNED: tl.constexpr, UNIT: tl.constexpr, MEASURES: tl.constexpr, CLIPS: tl.constexpr, RECORD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr,
) -> None:  # fmt: skip
    """U of a tile; the weights move by it, or it is only measured: Σ U² to the tile's slot."""
    record = table + tl.program_id(0).to(tl.int64) * RECORD
    place, element = tl.load(record), tl.load(record + 1)
    rows, columns = tl.load(record + 2).to(tl.int32), tl.load(record + 3).to(tl.int32)
    stride, spacing = tl.load(record + 4).to(tl.int32), tl.load(record + 5).to(tl.int32)
    over_y, over_x, between = tl.load(record + 6), tl.load(record + 7), tl.load(record + 8).to(tl.int32)
    mean = tl.load(means + tl.load(record + 9))
    start, end = tl.load(record + 12), tl.load(record + 13)
    a, b = stream_of(tl.load(record + 14), tl.load(record + 15), step)
    scale = 1.0
    if CLIPS:
        fragment = tl.load(record + 17)
        rms = tl.sqrt(tl.load(squares + fragment) / tl.load(totals + fragment))
        scale = 1.0 / tl.maximum(rms / bound, 1.0)
    if ALIGNED:
        place, stride, columns = (
            tl.multiple_of(place, ALIGN), tl.multiple_of(stride, ALIGN), tl.multiple_of(columns, ALIGN)
        )  # fmt: skip
    y = tl.arange(0, COLUMNS)
    along = y if UNIT else y * spacing
    of_columns = tl.rsqrt(tl.load(factors + over_x + along, mask=y < columns, other=1.0))
    partial = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, rows, ROWS):
        x = first + tl.arange(0, ROWS)
        of_rows = tl.rsqrt(tl.load(factors + over_y + x * between, mask=x < rows, other=1.0) / mean)
        at = (x * stride)[:, None] + along[None, :]
        mask = (x < rows)[:, None] & (y < columns)[None, :]
        if not ALIGNED:
            mask = mask & (element + at >= start) & (element + at < end)
        # one root after the other: their product overflows where a gradient is all zeros
        change = widened(tl.load(grad + place + at, mask=mask)) * of_columns[None, :] * of_rows[:, None]
        if MEASURES:
            partial += tl.where(mask, change * change, 0.0)
        else:
            m = keep1 * widened(tl.load(moment + place + at, mask=mask)) + new1 * change * scale
            tl.store(moment + place + at, nearest(m), mask=mask)
            move(weights + place, at, mask, m, lr, decay, element + at, a, b)
    if MEASURES:
        tl.store(partials + tl.load(record + 16), tl.sum(partial))


@triton.jit
def _add_slots(table: tl.tensor, partials: tl.tensor, squares: tl.tensor, COUNT: tl.constexpr) -> None:
    """Σ of a fragment's slots."""
    record = table + tl.program_id(0).to(tl.int64) * 3
    begin, count, fragment = tl.load(record), tl.load(record + 1).to(tl.int32), tl.load(record + 2)
    total = tl.zeros((COUNT,), dtype=tl.float32)
    for first in range(0, count, COUNT):
        lane = first + tl.arange(0, COUNT)
        total += tl.load(partials + begin + lane, mask=lane < count, other=0.0)
    tl.store(squares + fragment, tl.sum(total))


def sum_squares(tables: FactorTables, grad: torch.Tensor, sums: torch.Tensor) -> None:
    """Σ g² over y and over x of the elements that are here, to the factors' places in `sums`, which begins as zeros."""
    partials = torch.empty(tables.num_partials, device=grad.device)
    for table, aligned, unit in tables.tiles():
        launch(
            _sum_tiles, len(table), table, bits(grad), partials, ALIGNED=aligned, UNIT=unit, RECORD=TILE_RECORD,
            ROWS=ROWS_TO_SUM, COLUMNS=COLUMNS, ALIGN=ALIGN,
        )  # fmt: skip
    launch(_gather, len(tables.sums), tables.sums, partials, sums, RECORD=SUM_RECORD, OUTPUTS=GATHERED)


def finish(
    tables: FactorTables, sums: torch.Tensor, factors: torch.Tensor, keep: float, new: float, eps: float
) -> torch.Tensor:
    """factors ← keep·factors + new·(mean of squares + eps); returns the means over x of those over y."""
    means = torch.empty(tables.num_means, device=sums.device)
    launch(
        _finish, len(tables.factors), tables.factors, sums, factors, means, float(keep), float(new), float(eps), RECORD=FACTOR_RECORD,
        COUNT=GATHERED,
    )  # fmt: skip
    return means


def move_weights(
    tables: FactorTables, weights: torch.Tensor, grad: torch.Tensor, moment: torch.Tensor, factors: torch.Tensor,
    means: torch.Tensor, number: int, lr: float, decay: float, keep1: float, new1: float,
    partials: torch.Tensor | None = None, clips: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> None:  # fmt: skip
    """m ← keep1·m + new1·U, θ ← θ − lr·(m + decay·θ); with `partials` only Σ U² of each tile, to its slot there.

    Args as those of `elementwise.step`.
    """
    squares, totals, bound = clips if clips else (means, means, 1.0)
    for table, aligned, unit in tables.tiles():
        launch(
            _move_tiles, len(table), table, bits(weights), bits(grad), bits(moment), factors, means,
            means if partials is None else partials, squares, totals, number, float(lr), float(decay),
            float(keep1), float(new1), float(bound), ALIGNED=aligned, UNIT=unit, MEASURES=partials is not None, CLIPS=clips is not None, RECORD=TILE_RECORD,
            ROWS=ROWS_TO_MOVE, COLUMNS=COLUMNS, ALIGN=ALIGN,
        )  # fmt: skip


def add_slots(table: torch.Tensor, partials: torch.Tensor, squares: torch.Tensor) -> None:
    """Σ U² of each fragment that is here, to its place in `squares`, which begins as zeros."""
    launch(_add_slots, len(table), table, partials, squares, COUNT=GATHERED)
