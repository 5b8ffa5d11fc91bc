"""Which axes are factored, and that pieces tile a fragment."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitds.optim.factoring import as_slabs, factoring_of, pieces_of


@pytest.mark.parametrize(
    ("view", "row", "col"),
    [
        ((3, 16, 104, 1664), (3, 16, 104), (3, 16, 1664)),  # q, k, v of G/14
        ((1664, 16, 104), (16, 104), (1664, 16)),  # its output projection
        ((8192, 1664), (1664,), (8192,)),
        ((1, 256, 1664), (1, 256), (1, 1664)),  # position embedding
        ((768, 3, 32, 32), (3, 32, 32), (768, 3, 32)),  # 32-pixel patches: the later 32 is the second largest
        ((48, 48), (48,), (48,)),
        ((1664, 3, 14, 14), None, None),
        ((1664, 3, 16, 16), None, None),
        ((3, 16, 104), None, None),  # bias of q, k, v
        ((1, 1, 1664), None, None),  # probe
        ((1664,), None, None),
        ((), None, None),
    ],
)
def test_factored_axes_are_the_two_largest(view, row, col):
    axes = factoring_of(view, 32)
    assert (axes.row_shape if axes else None) == row
    assert (axes.col_shape if axes else None) == col


VIEWS = [(5, 7), (4, 5, 6), (3, 2, 5, 4), (6, 2, 5), (5, 2, 6, 3), (2, 9, 1, 3, 8)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pieces_tile_the_fragment_and_stay_small(data):
    view = data.draw(st.sampled_from(VIEWS))
    total = torch.Size(view).numel()
    start = data.draw(st.integers(0, total))
    numel = data.draw(st.integers(0, total - start))
    chunk = data.draw(st.sampled_from([1, 7, 20, 64, 10**6]))
    axes = factoring_of(view, 2)
    assert axes is not None
    values = torch.arange(1, total + 1)
    fragment = values[start : start + numel]
    seen = torch.zeros(axes.batch, axes.x, axes.middle, axes.y, axes.trailing, dtype=torch.int64)
    slab = torch.empty(axes.slab, dtype=torch.int64)
    position = partial = 0
    for piece in pieces_of(axes, start, numel, chunk):
        assert piece.offset == position
        assert piece.numel <= max(chunk, axes.slab)
        position += piece.numel
        partial += piece.numel < axes.slab
        block = as_slabs(axes, piece, fragment, slab)
        assert int((block != 0).sum()) == piece.numel
        seen[piece.batch : piece.batch + piece.num_batch, piece.x : piece.x + piece.num_x] += block
    assert position == numel
    assert partial <= 2
    wanted = torch.zeros(total, dtype=torch.int64)
    wanted[start : start + numel] = fragment
    assert torch.equal(seen.view(-1), wanted)
