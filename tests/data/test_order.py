"""The order of the stream: a permutation per epoch, the same one by one and in bulk, well mixed; and, windowed, one that
keeps neighbours together, against the same order made of lists."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vitds.data.order import FullOrder, WindowedOrder, _draw, build_order, order
from vitds.data.permutation import permuted
from vitds.data.section import OrderSection

HUGE = 3_000_000_019
FAR = 2**62

sizes = st.builds(
    lambda num_images, run, runs_of_block, window: (num_images, run, run * runs_of_block, window),
    st.integers(1, 300),
    st.integers(1, 20),
    st.integers(1, 12),
    st.integers(1, 8),
)
"""(num_images, run_images, block_images, window_blocks): epochs smaller than a run, a block, a window, and larger."""
seeds = st.integers(-(2**70), 2**70)
epochs = st.one_of(st.integers(0, 5), st.integers(0, 2**40))


def epoch_of(order, num_images, epoch):
    return order.indices(epoch * num_images + np.arange(num_images)).tolist()


@pytest.mark.parametrize("num_images", [1, 2, 3, 4, 5, 31, 32, 33, 1024, 1031, 1797])
def test_every_epoch_holds_every_image_once(num_images):
    for epoch in (0, 1, 900):
        assert sorted(epoch_of(FullOrder(3, num_images), num_images, epoch)) == list(range(num_images))


@settings(max_examples=200, deadline=None)
@given(sizes, seeds, epochs)
@example((1, 16, 1024, 64), 0, 0)
@example((300, 1, 1, 1), 0, 1)
@example((290, 5, 10, 7), 0, 2)  # 29 blocks in windows of 5 and 6
@example((291, 5, 10, 7), 0, 3)  # and a short run, alone in its block
def test_windows_keep_every_image_once(size, seed, epoch):
    assert sorted(epoch_of(WindowedOrder(seed, *size), size[0], epoch)) == list(range(size[0]))


@settings(max_examples=100, deadline=None)
@given(sizes, seeds, epochs, st.booleans())
def test_one_by_one_equals_in_bulk_over_an_epoch_edge(size, seed, epoch, windowed):
    num_images = size[0]
    stream = WindowedOrder(seed, *size) if windowed else FullOrder(seed, num_images)
    positions = (epoch + 1) * num_images + np.arange(-min(num_images, 40), min(num_images, 40))
    in_bulk = stream.indices(positions).tolist()
    assert in_bulk == [int(stream.indices(np.array([position]))[0]) for position in positions]
    shuffled = np.random.default_rng(0).permutation(len(positions))
    assert stream.indices(positions[shuffled]).tolist() == [in_bulk[i] for i in shuffled]
    if not windowed:
        assert in_bulk == [order(seed, int(position), num_images) for position in positions]


def windowed_by_lists(seed, epoch, num_images, run_images, block_images, window_blocks):
    """The images of an epoch as its definition says, by cutting and joining lists."""

    def cut(images, length):
        return [images[start : start + length] for start in range(0, len(images), length)]

    def mixed(pieces, length, name):
        whole = [piece for piece in pieces if len(piece) == length]
        short = [piece for piece in pieces if len(piece) < length]
        return [whole[permuted(name, i, len(whole))] for i in range(len(whole))] + short

    name = f"{seed}/{epoch}"
    begin = _draw(f"rotation/{name}", num_images)
    ring = [(begin + i) % num_images for i in range(num_images)]
    blocks = mixed(cut(ring, block_images), block_images, f"blocks/{name}")
    found = []
    for number, window in enumerate(np.array_split(np.arange(len(blocks)), -(-len(blocks) // window_blocks))):
        runs = [run for block in window for run in cut(blocks[block], run_images)]
        found += [image for run in mixed(runs, run_images, f"runs/{name}/{number}") for image in run]
    return found


@settings(max_examples=200, deadline=None)
@given(sizes, seeds, epochs)
@example((300, 1, 1, 1), 0, 1)
@example((97, 4, 12, 2), 0, FAR // 97 - 1)  # the last whole epoch of the stream
def test_windows_are_those_of_the_definition(size, seed, epoch):
    assert epoch_of(WindowedOrder(seed, *size), size[0], epoch) == windowed_by_lists(seed, epoch, *size)


@settings(max_examples=200, deadline=None)
@given(sizes, seeds, epochs)
def test_neighbours_stay_together_and_windows_touch_few_places(size, seed, epoch):
    num_images, run_images, block_images, window_blocks = size
    indices = np.array(epoch_of(WindowedOrder(seed, *size), num_images, epoch))
    steps = np.diff(indices) % num_images
    assert all(np.delete(steps, np.s_[run_images - 1 :: run_images]) == 1 % num_images)  # but at the ends of runs
    blocks = -(-num_images // block_images)
    windows = -(-blocks // window_blocks)
    lengths = [len(part) * block_images for part in np.array_split(np.arange(blocks), windows)]
    assert max(lengths) <= window_blocks * block_images < 2 * min(lengths) + block_images or windows == 1
    for start, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
        places = np.sort(indices[start : start + length])
        assert 1 + (np.diff(places) > 1).sum() <= window_blocks + 1  # one block may lie across the end of storage


@pytest.mark.parametrize("make", [FullOrder, lambda seed, n: WindowedOrder(seed, n, 1, 2, 8)], ids=["full", "windowed"])
def test_small_epochs_take_every_permutation_about_equally_often(make):
    seen = Counter(tuple(epoch_of(make(0, 4), 4, epoch)) for epoch in range(2400))
    assert len(seen) == 24
    assert min(seen.values()) > 60
    assert max(seen.values()) < 145


def test_windows_favour_no_image_at_any_place():
    """Over many epochs each image comes at each place equally often, also where short blocks and runs come last."""
    num_images, epochs = 23, 4600
    stream = WindowedOrder(1, num_images, 2, 6, 2)
    indices = stream.indices(np.arange(num_images * epochs)).reshape(epochs, num_images)
    counts = np.stack([np.bincount(at_place, minlength=num_images) for at_place in indices.T])
    expected, freedom = epochs / num_images, (num_images - 1) ** 2
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_seeds_epochs_and_windows_differ():
    first = np.array(epoch_of(FullOrder(0, 1797), 1797, 0))
    for seed, epoch in ((1, 0), (0, 1)):
        other = np.array(epoch_of(FullOrder(seed, 1797), 1797, epoch))
        assert (first == other).sum() < 12  # two random permutations agree at one place on average
    size = 1800, 1, 100, 6  # 3 windows of 600
    first = np.array(epoch_of(WindowedOrder(0, *size), 1800, 0))
    for seed, epoch in ((1, 0), (0, 1)):
        assert (first == np.array(epoch_of(WindowedOrder(seed, *size), 1800, epoch))).sum() < 12
    within = [np.argsort(np.argsort(first[start : start + 600])) for start in (0, 600, 1200)]
    assert max((within[0] == within[1]).sum(), (within[1] == within[2]).sum()) < 12


@pytest.mark.parametrize("kind", ["full", "windowed"])
def test_three_billion_images(kind):
    stream = build_order(OrderSection(kind), 7, HUGE)
    window = 64 * 1024
    for start in (0, HUGE - 2 * window, 41 * HUGE + 12_345, 10**15, FAR - 4 * window):
        positions = start + np.arange(4 * window)
        indices = stream.indices(positions)
        assert indices.min() >= 0
        assert indices.max() < HUGE
        this_epoch = positions // HUGE == positions[0] // HUGE
        assert len(np.unique(indices[this_epoch])) == this_epoch.sum()
        sample = slice(None, None, 5003)
        assert indices[sample].tolist() == [int(stream.indices(np.array([p]))[0]) for p in positions[sample]]
        # Spread as independent draws of whole blocks, or of single images, would be.
        apart = 1024 if kind == "windowed" else 1
        counts = np.bincount(indices * 64 // HUGE, minlength=64)
        chi_square = ((counts - len(indices) / 64) ** 2 / (len(indices) / 64)).sum() / apart
        assert chi_square < 63 + 5 * np.sqrt(2 * 63)
        if kind == "full":
            assert indices[:50].tolist() == [order(7, int(p), HUGE) for p in positions[:50]]
            jumps = np.abs(np.diff(indices)) / HUGE
            assert abs(jumps.mean() - 1 / 3) < 0.01  # neighbours in the stream are strangers in the source


@pytest.mark.parametrize("kind", ["full", "windowed"])
def test_memory_does_not_grow_with_the_images(kind):
    peaks = []
    for num_images in (10_007, HUGE):
        stream = build_order(OrderSection(kind), 7, num_images)
        tracemalloc.start()
        for epoch in range(3):
            stream.indices(epoch * num_images + np.arange(1024))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 256 * 1024  # for 1024 positions


def test_the_run_of_blocks_in_a_window_is_random():
    """Two runs that follow each other come from the same of 64 blocks as seldom as by chance."""
    indices = WindowedOrder(0, 2**20, 16, 1024, 64).indices(np.arange(2**16)) - _draw("rotation/0/0", 2**20)
    blocks = indices[::16] % 2**20 // 1024
    assert len(np.unique(blocks)) == 64
    same = (np.diff(blocks) == 0).sum()
    assert abs(same - 4095 / 64) < 5 * np.sqrt(4095 / 64)
