"""Work tables: one record of int64 per program, made once per flat, by which the program finds its elements.

An elementwise record covers up to RUN elements of one fragment. A factored record covers up to ROWS rows by COLUMNS
columns of one (batch, middle, trailing) index of one fragment, where rows run along x and columns along y
(vitds.optim.factoring). Each such tile leaves its sums of squares at places of its own, and a third kind of record says
which of them add up to which factor, in which order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from vitds.layout import Flat
from vitds.optim.factoring import Factored, Factoring
from vitds.optim.rounding import name_key

RUN = 2**15
"""Elements of an elementwise record: few enough to keep every processor busy, many enough to make records cheap."""
ROWS = 256
COLUMNS = 128
ALIGN = 8
"""Elements to which a tile's rows are aligned where they can be loaded in wide words: 16 bytes of bf16."""
GATHERED = 1024
"""Outputs of one record of the second stage."""

RUN_RECORD = 9
"""place, from, to, element, state, name's low and high word, slot, fragment.

Elements [place + from, place + to) of the flat; `element` and `state` are what to add to a place in the flat for the
element's index in the whole parameter and its place in "exp_avg_sq"; `slot` is the tile's place among partial sums.
"""
TILE_RECORD = 18
"""place, element, rows, columns, row stride, column stride, over_y, over_x, over_y's stride, mean, row partial,
column partial, start, end, name's low and high word, slot, fragment.

`place` in the flat and `element` of the whole parameter belong to the tile's first row and column; over_y, over_x and
mean are places of its factors; only elements in [start, end) are here.
"""
SUM_RECORD = 5
"""from, to, terms, stride, outputs: outputs[i] = Σ_k partials[from + k·stride + i]."""
FACTOR_RECORD = 5
"""begin, stride, count, divisor, mean (or −1): factors whose sums are divided alike, and where their mean goes."""


@dataclass(frozen=True)
class FactorTables:
    """The tables of a flat's factored fragments, on the flat's device."""

    aligned: torch.Tensor
    ragged: torch.Tensor
    """Tiles with a column stride of 1, at any place and with any elements missing."""
    strided: torch.Tensor
    sums: torch.Tensor
    factors: torch.Tensor
    num_partials: int
    """Fp32 words in which the tiles leave their sums."""
    num_means: int

    def tiles(self) -> list[tuple[torch.Tensor, bool, bool]]:
        """(table, aligned, unit column stride) of those that are not empty: one launch each."""
        kinds = [(self.aligned, True, True), (self.ragged, False, True), (self.strided, False, False)]
        return [kind for kind in kinds if len(kind[0])]


def _table(records: Iterable[list[int]], width: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([*records], dtype=torch.int64).view(-1, width).to(device)


def _columns(records: int, fields: Sequence[int | torch.Tensor]) -> torch.Tensor:
    """Records that differ in some fields and share the others."""
    table = torch.empty(records, len(fields), dtype=torch.int64)
    for i, values in enumerate(fields):
        table[:, i] = values
    return table


def _joined(parts: list[torch.Tensor], width: int) -> torch.Tensor:
    return torch.cat(parts) if parts else torch.empty(0, width, dtype=torch.int64)


class Slots:
    """Places for one partial sum per tile, those of a fragment together, so that they add up in one record."""

    def __init__(self) -> None:
        self.taken: list[list[int]] = []

    @property
    def count(self) -> int:
        return self.taken[-1][0] + self.taken[-1][1] if self.taken else 0

    def take(self, fragment: int, count: int) -> int:
        """The first of `count` places for a fragment."""
        self.taken.append([self.count, count, fragment])
        return self.taken[-1][0]

    def table(self, device: torch.device) -> torch.Tensor:
        """begin, count, fragment: (fragments that are here, 3)."""
        return _table(self.taken, 3, device)


def runs(flat: Flat, seed: int, states: dict[int, int] | None = None, slots: Slots | None = None) -> torch.Tensor:
    """Elementwise records, (programs, RUN_RECORD).

    Args:
        flat: whose fragments.
        seed: of the rounding.
        states: fragment index -> its place in "exp_avg_sq", and only these fragments; None: all, laid out as the flat.
        slots: where partial sums are kept, if they are.
    """
    records = []
    for index, f in enumerate(flat.fragments):
        if not f.numel or (states is not None and index not in states):
            continue
        place = torch.arange(f.offset // (2 * ALIGN) * 2 * ALIGN, f.offset + f.numel, RUN)
        slot = slots.take(index, len(place)) if slots is not None else 0
        fields: list[int | torch.Tensor] = [
            place, (f.offset - place).clamp(min=0), (f.offset + f.numel - place).clamp(max=RUN), f.start - f.offset,
            0 if states is None else states[index] - f.offset, *name_key(seed, f.name), slot + torch.arange(len(place)),
            index,
        ]  # fmt: skip
        records.append(_columns(len(place), fields))
    return _joined(records, RUN_RECORD).to(flat.tensor.device)


def factor_tables(flat: Flat, sections: Sequence[Factored], seed: int, slots: Slots) -> FactorTables:
    """The tables of a flat's factored fragments."""
    tiles: dict[str, list[torch.Tensor]] = {"aligned": [], "ragged": [], "strided": []}
    sums: list[list[int]] = []
    factors: list[list[int]] = []
    partials = num_means = 0
    for section in sections:
        f, axes = section.fragment, section.axes
        factors += _factor_records(section, num_means)
        if f.numel:
            partials = _tile_records(section, num_means, name_key(seed, f.name), partials, tiles, sums, slots)
        num_means += axes.batch * axes.middle * axes.trailing
    device = flat.tensor.device
    made = {kind: _joined(found, TILE_RECORD).to(device) for kind, found in tiles.items()}
    cut = [
        [begin + at, to + at, terms, stride, min(GATHERED, outputs - at)]
        for begin, to, terms, stride, outputs in sums
        for at in range(0, outputs, GATHERED)
    ]
    return FactorTables(
        **made,
        sums=_table(cut, SUM_RECORD, device),
        factors=_table(factors, FACTOR_RECORD, device),
        num_partials=partials,
        num_means=num_means,
    )


def _factor_records(section: Factored, mean: int) -> list[list[int]]:
    """How the sums of a whole parameter become means: those over x in runs, those over y along x."""
    axes = section.axes
    records = [
        [section.middle + at, 1, min(GATHERED, axes.num_over_x - at), axes.x, -1]
        for at in range(0, axes.num_over_x, GATHERED)
    ]
    inner = axes.middle * axes.trailing
    for batch in range(axes.batch):
        for at in range(inner):
            begin = section.begin + batch * axes.x * inner + at
            records.append([begin, inner, axes.x, axes.y, mean + batch * inner + at])
    return records


def _blocks_of_rows(axes: Factoring, start: int, end: int) -> list[tuple[int, int, bool]]:
    """(first row, rows, whether they are whole): at most ROWS, of one batch entry; a row that is cut stands alone."""
    blocks, row, last = [], start // axes.slab, (end - 1) // axes.slab
    while row <= last:
        whole = start <= row * axes.slab and (row + 1) * axes.slab <= end
        size = 1
        if whole:
            size = min(ROWS, axes.x - row % axes.x, end // axes.slab - row)
        blocks.append((row, size, whole))
        row += size
    return blocks


def _tile_records(
    section: Factored,
    mean: int,
    name: tuple[int, int],
    partials: int,
    tiles: dict[str, list[torch.Tensor]],
    sums: list[list[int]],
    slots: Slots,
) -> int:
    """Adds a fragment's tiles and the sums of what they leave; returns where the next partial sums begin."""
    f, axes = section.fragment, section.axes
    assert ROWS * axes.slab < 2**31, "the kernels count within a tile in 32 bits"
    start, end, shift = f.start, f.start + f.numel, f.offset - f.start
    inner, columns = axes.middle * axes.trailing, -(-axes.y // COLUMNS)
    blocks = _blocks_of_rows(axes, start, end)
    first_row, num_rows = blocks[0][0], sum(size for _, size, _ in blocks)
    # (column block, row, middle, trailing), then one slab per block of rows
    row_partials, partials = partials, partials + columns * num_rows * inner
    sums.append([row_partials, section.begin + first_row * inner, columns, num_rows * inner, num_rows * inner])
    middle, trailing, column = (
        axis.reshape(-1)
        for axis in torch.meshgrid(
            torch.arange(axes.middle), torch.arange(axes.trailing), torch.arange(columns), indexing="ij"
        )
    )
    lane = middle * axes.trailing + trailing
    within = (middle * axes.y + column * COLUMNS) * axes.trailing + trailing  # of the slab
    widths = (axes.y - column * COLUMNS).clamp(max=COLUMNS)
    wide = axes.trailing == 1 and not (axes.slab % ALIGN or axes.y % ALIGN or shift % ALIGN)
    batch_before, slot = -1, slots.take(section.index, len(blocks) * len(lane))
    for number, (row, size, whole) in enumerate(blocks):
        batch = row // axes.x
        if batch != batch_before:
            sums.append([partials, section.middle + batch * axes.slab, 0, axes.slab, axes.slab])
            batch_before = batch
        sums[-1][2] += 1
        element = row * axes.slab + within
        fields: list[int | torch.Tensor] = [
            element + shift, element, size, widths, axes.slab, axes.trailing,
            section.begin + row * inner + lane, section.middle + batch * axes.slab + within, inner,
            mean + batch * inner + lane,
            row_partials + (column * num_rows + row - first_row) * inner + lane, partials + within,
            start, end, *name, slot + number * len(lane) + torch.arange(len(lane)), section.index,
        ]  # fmt: skip
        partials += axes.slab
        tiles["strided" if axes.trailing > 1 else "aligned" if wide and whole else "ragged"].append(
            _columns(len(lane), fields)
        )
    return partials
