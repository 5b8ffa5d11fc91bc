"""Ranges of positions that a stream hops over: against the plain list of batches that are left."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from vitds.data.skips import batch_start, hop, merged, reach_back

BATCH = 6
BATCHES = 60  # enough for every stream of these tests
ranges_of_batches = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5)), max_size=6).map(
    lambda pairs: [[first * BATCH, (first + number) * BATCH] for first, number in pairs]
)


@settings(max_examples=300, deadline=None)
@given(ranges_of_batches, st.integers(0, 25))
def test_batches_hop_over_skipped_ranges(skipped, first):
    """Ranges overlap, touch, repeat and come in any order; the stream is what is left of the batches without them."""
    gone = {position for start, end in skipped for position in range(start, end)}
    left = [start for start in range(first * BATCH, BATCHES * BATCH, BATCH) if start not in gone]
    assert [batch_start(number, first * BATCH, BATCH, skipped) for number in range(20)] == left[:20]
    assert hop(first * BATCH, skipped) == left[0]
    disjoint = merged(skipped)
    assert {position for start, end in disjoint for position in range(start, end)} == gone
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(disjoint))
    assert merged(disjoint) == disjoint


@settings(max_examples=300, deadline=None)
@given(ranges_of_batches, st.integers(0, 25), st.integers(1, 12))
def test_reaching_back_counts_batches_once(skipped, at, batches):
    at = hop(at * BATCH, skipped)
    start = reach_back(at, batches, BATCH, skipped)
    seen = [batch for batch in range(start, at + BATCH, BATCH) if hop(batch, skipped) == batch]
    assert seen[0] == start
    assert len(seen) == batches or hop(0, skipped) == start
    assert len(seen) <= batches
