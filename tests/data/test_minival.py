"""A minival: images of the training set that are evaluated and not trained on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.data.test_exclusion import Numbers
from vitds.data import DataSection, EvalLoader, SourceSection, TrainLoader, build_sources
from vitds.data.minival import Part, hold_out
from vitds.errors import UserError

DIGITS = DataSection(SourceSection("digits", transforms=[]), SourceSection("digits", transforms=[]))


def keys(source) -> list[str]:
    return [source.key(i) for i in range(len(source))]


@pytest.mark.parametrize(("amount", "number"), [(0.02, 20), (0.0001, 1), (1, 1), (300, 300), (999, 999)])
def test_both_parts_are_all_images_in_their_order(amount, number):
    train, held = hold_out(Numbers(1000), amount)
    assert held is not None
    assert (len(train), len(held)) == (1000 - number, number)
    everything = [f"n/{i}" for i in range(1000)]
    assert sorted([*keys(train), *keys(held)]) == sorted(everything)
    for part in (train, held):
        order = keys(part)
        assert order == sorted(order, key=lambda key: int(key[2:]))
        assert [sample[2] for sample in part.read_many(range(len(part))[::-1])] == order[::-1]
        assert [part.label(i) for i in range(len(part))] == [int(key[2:]) for key in order]
        assert part.find([*everything, "n/x"]) == {key: i for i, key in enumerate(order)}


def test_which_they_are_depends_on_nothing_but_their_number():
    small, large = (keys(hold_out(Numbers(1000), amount)[1]) for amount in (0.02, 0.1))
    assert set(small) < set(large)
    numbers = np.array([int(key[2:]) for key in large])
    # Spread over storage: each tenth of it holds some, and none holds half.
    tenths = np.bincount(numbers // 100, minlength=10)
    assert tenths.min() > 0
    assert tenths.max() < 50
    # The very images; changing them would let runs that were begun before train on what they are judged by.
    assert keys(hold_out(Numbers(1000), 3)[1]) == ["n/243", "n/612", "n/763"]


def test_labels_out_of_range_are_counted_where_they_are():
    whole = Numbers(50)
    train, held = hold_out(whole, 10)
    assert held is not None
    for bound in (0, 30, 49, 50):
        assert train.count_labels_from(bound) + held.count_labels_from(bound) == whole.count_labels_from(bound)


def test_the_digest_tells_which_images():
    whole = Numbers(50)
    digests = {whole.digest(), *(part.digest() for n in (1, 2, 3) for part in hold_out(whole, n) if part)}
    assert len(digests) == 7
    assert Part(whole, np.array([3, 1])).digest() == Part(whole, np.array([1, 3])).digest()


@pytest.mark.parametrize(
    ("amount", "said"),
    [
        (-0.1, "found -0.1"),
        (1.5, "found 1.5"),
        (1437, "holds out all 1437 training images"),
        (0.9999, "all 1437"),
        (float("nan"), "found nan"),
        (float("inf"), "found inf"),
    ],
)
def test_what_cannot_be_held_out_is_refused(amount, said):
    with pytest.raises(UserError, match=rf"^vitds\.data\.minival: .*{said}"):
        build_sources(replace(DIGITS, minival=amount), 10)


def test_it_is_loaded_as_the_evaluation_is_and_never_trained_on():
    sources = build_sources(replace(DIGITS, minival=0.02), 10)
    assert {role: card["images"] for role, card in sources.identity().items()} == {
        "train": 1408,
        "eval": 360,
        "minival": 29,
    }
    shared = {"image_size": 8, "num_classes": 10, "rank": 0, "world_size": 1}
    loader = EvalLoader(sources.minival, DIGITS, batch=16, role="minival", **shared)
    seen = np.concatenate([batch.images[batch.is_real].numpy() for batch in loader])
    stored = [sources.minival.read(i)[0] for i in range(29)]
    np.testing.assert_array_equal(seen.reshape(29, -1)[:, :64], np.stack(stored).reshape(29, -1)[:, :64])
    stream = TrainLoader(sources.train, DIGITS, seed=0, global_batch=1408, micro_batch=1408, **shared)
    trained = {image.numpy().tobytes() for image in next(stream).images}
    alike = sum(image.numpy().tobytes() in trained for batch in loader for image in batch.images[batch.is_real])
    stream.close()
    assert alike == 0  # no two digits are the same
