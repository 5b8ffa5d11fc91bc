"""One launch per flat for what is done element by element: Adam, SGD, and Adafactor's unfactored parameters."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vitds.optim.kernels import bits, launch
from vitds.optim.kernels.device import move, nearest, stream_of, widened
from vitds.optim.kernels.tables import RUN_RECORD

BLOCK = 1024
"""Elements a program works on at a time."""
ADAM, SGD, ADAFACTOR, MEASURE = 0, 1, 2, 3
"""What is done; MEASURE brings Adafactor's second moment up to date and leaves each tile's sum of U²."""


@triton.jit
def _block(
    weights: tl.tensor, grad: tl.tensor, moment: tl.tensor, square: tl.tensor, partial: tl.tensor, place: tl.tensor, begin: tl.tensor, low: tl.tensor, high: tl.tensor,
    element: tl.tensor, state: tl.tensor, a: tl.tensor, b: tl.tensor, scale: tl.tensor, lr: tl.tensor, decay: tl.tensor, keep1: tl.tensor, new1: tl.tensor, keep2: tl.tensor,
    new2: tl.tensor, ratio: tl.tensor, eps: tl.tensor, KIND: tl.constexpr, CLIPS: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """BLOCK elements from place + begin on; returns their sum of U² where KIND is to measure it."""
    lane = begin + tl.arange(0, BLOCK)
    at = place + lane
    mask = None if FULL else (lane >= low) & (lane < high)
    g = widened(tl.load(grad + at, mask=mask))
    if KIND == 2 and CLIPS:  # measured before: the second moment is new already
        change = g * tl.rsqrt(tl.load(square + at + state, mask=mask)) * scale
    elif KIND >= 2:
        v = keep2 * tl.load(square + at + state, mask=mask) + new2 * (g * g + eps)
        tl.store(square + at + state, v, mask=mask)
        change = g * tl.rsqrt(v)
    else:
        change = g
    if KIND == 3:
        found = change * change
        return partial + tl.sum(found if FULL else tl.where(mask, found, 0.0))
    else:
        m = keep1 * widened(tl.load(moment + at, mask=mask)) + new1 * change
        tl.store(moment + at, nearest(m), mask=mask)
        if KIND == 0:
            v = keep2 * tl.load(square + at, mask=mask) + new2 * g * g
            tl.store(square + at, v, mask=mask)
            m = ratio * m / (tl.sqrt(v) + eps)
        move(weights, at, mask, m, lr, decay, at + element, a, b)
        return partial


@triton.jit(do_not_specialize=["step"])
def _step(
    table: tl.tensor, weights: tl.tensor, grad: tl.tensor, moment: tl.tensor, square: tl.tensor, partials: tl.tensor, squares: tl.tensor, totals: tl.tensor, step: tl.tensor,
    lr: tl.tensor, decay: tl.tensor, keep1: tl.tensor, new1: tl.tensor, keep2: tl.tensor, new2: tl.tensor, ratio: tl.tensor, eps: tl.tensor, bound: tl.tensor,
    KIND: tl.constexpr, CLIPS: tl.constexpr, RECORD: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """A record's elements, BLOCK at a time; only those at the ends of a fragment are masked."""
    record = table + tl.program_id(0).to(tl.int64) * RECORD
    place, low, high = tl.multiple_of(tl.load(record), 16), tl.load(record + 1), tl.load(record + 2)
    element, state = tl.load(record + 3), tl.load(record + 4)
    a, b = stream_of(tl.load(record + 5), tl.load(record + 6), step)
    scale = 1.0
    if CLIPS:
        fragment = tl.load(record + 8)
        rms = tl.sqrt(tl.load(squares + fragment) / tl.load(totals + fragment))
        scale = 1.0 / tl.maximum(rms / bound, 1.0)
    partial = 0.0
    for begin in range(0, high.to(tl.int32), BLOCK):
        if (begin >= low) & (begin + BLOCK <= high):
            partial = _block(
                weights, grad, moment, square, partial, place, begin, low, high, element, state, a, b, scale, lr,
                decay, keep1, new1, keep2, new2, ratio, eps, KIND, CLIPS, True, BLOCK,
            )  # fmt: skip
        else:
            partial = _block(
                weights, grad, moment, square, partial, place, begin, low, high, element, state, a, b, scale, lr,
                decay, keep1, new1, keep2, new2, ratio, eps, KIND, CLIPS, False, BLOCK,
            )  # fmt: skip
    if KIND == 3:
        tl.store(partials + tl.load(record + 7), partial)


def step(
    kind: int, table: torch.Tensor, weights: torch.Tensor, grad: torch.Tensor, moment: torch.Tensor, number: int,
    lr: float, decay: float, keep1: float, new1: float, square: torch.Tensor | None = None, keep2: float = 0.0,
    new2: float = 0.0, ratio: float = 1.0, eps: float = 0.0, partials: torch.Tensor | None = None,
    clips: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> None:  # fmt: skip
    """θ ← θ − lr·(change + decay·θ) with m ← keep1·m + new1·U, by `kind`:

    ADAM: U = g, v ← keep2·v + new2·g², change = ratio·m/(√v + eps).   SGD: U = g, change = m.
    ADAFACTOR: v ← keep2·v + new2·(g² + eps), U = g·v^−½, change = m; with `clips` v is not touched.
    MEASURE: v as ADAFACTOR's, Σ U² of each record to its slot in `partials`, nothing else.

    Args:
        kind: see above.
        table: of `tables.runs`.
        weights: of the flat, fp32 or bf16.
        grad: likewise.
        moment: bf16, laid out like the flat.
        number: of the update, from 1.
        lr, decay, keep1, new1, keep2, new2, ratio, eps: see above.
        square: fp32.
        partials: fp32.
        clips: sums of U² of whole parameters, their numbers of elements, and the bound on the RMS of U.
    """
    squares, totals, bound = clips if clips else (table, table, 1.0)
    launch(
        _step, len(table), table, bits(weights), bits(grad), bits(moment), table if square is None else square.view(-1),
        table if partials is None else partials, squares, totals, number, float(lr), float(decay),
        float(keep1), float(new1), float(keep2), float(new2), float(ratio), float(eps), float(bound), KIND=kind, CLIPS=clips is not None, RECORD=RUN_RECORD, BLOCK=BLOCK,
    )  # fmt: skip
