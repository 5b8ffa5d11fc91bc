"""The order of the stream: a permutation per epoch, the same one by one and in bulk, and well mixed."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitds.data.order import order, orders
from vitds.data.skips import batch_start, hop, merged, reach_back

HUGE = 3_000_000_019


@pytest.mark.parametrize("num_images", [1, 2, 3, 4, 5, 31, 32, 33, 1024, 1031, 1797])
def test_every_epoch_holds_every_image_once(num_images):
    for epoch in (0, 1, 900):
        positions = np.arange(epoch * num_images, (epoch + 1) * num_images)
        assert sorted(orders(3, positions, num_images)) == list(range(num_images))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(), st.integers(0, 2**40))
def test_one_by_one_equals_in_bulk_over_an_epoch_edge(num_images, seed, epoch):
    positions = np.arange(epoch * num_images, (epoch + 2) * num_images) + num_images // 2
    one_by_one = [order(seed, int(position), num_images) for position in positions]
    assert one_by_one == orders(seed, positions, num_images).tolist()
    first_whole_epoch = one_by_one[num_images - num_images // 2 :][:num_images]
    assert sorted(first_whole_epoch) == list(range(num_images))


def test_small_epochs_take_every_permutation_about_equally_often():
    seen = Counter(tuple(orders(0, np.arange(4 * e, 4 * e + 4), 4)) for e in range(2400))
    assert len(seen) == 24
    assert min(seen.values()) > 60
    assert max(seen.values()) < 145


def test_seeds_and_epochs_differ():
    first = orders(0, np.arange(1797), 1797)
    for other in (orders(1, np.arange(1797), 1797), orders(0, np.arange(1797, 2 * 1797), 1797)):
        assert (first == other).sum() < 12  # two random permutations agree at one place on average


def test_three_billion_images():
    for start in (0, HUGE - 10_000, 41 * HUGE + 12_345, 10**15):
        positions = start + np.arange(20_000)
        indices = orders(7, positions, HUGE)
        assert indices.min() >= 0
        assert indices.max() < HUGE
        within_epoch = positions // HUGE == positions[0] // HUGE
        assert len(np.unique(indices[within_epoch])) == within_epoch.sum()
        assert indices[:50].tolist() == [order(7, int(p), HUGE) for p in positions[:50]]
        counts = np.bincount(indices * 64 // HUGE, minlength=64)
        chi_square = ((counts - 20_000 / 64) ** 2 / (20_000 / 64)).sum()
        assert chi_square < 63 + 5 * np.sqrt(2 * 63)
        jumps = np.abs(np.diff(indices)) / HUGE
        assert abs(jumps.mean() - 1 / 3) < 0.01  # neighbours in the stream are strangers in the source


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
