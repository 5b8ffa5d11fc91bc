"""Loaders: one stream whatever the world, bad images, evaluations that cover every image once."""

import math
import multiprocessing
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from vitds.data import DataSection, EvalLoader, Source, SourceSection, TrainLoader, build_source, order, storage
from vitds.data.batch import to_model_range
from vitds.data.samples import mixup_weight
from vitds.errors import UserError

GLOBAL_BATCH = 48
STEPS = 9  # the 360 images end in the middle of the eighth global batch
DIGITS = SourceSection("digits", split="eval", transforms=["random_shift", "flip_lr"])


@pytest.fixture(scope="module")
def digits():
    return build_source(DIGITS, "train")


def train_loader(source, section, **changes):
    settings = {"image_size": 8, "num_classes": 10, "seed": 5, "global_batch": GLOBAL_BATCH} | changes
    return TrainLoader(source, section, **{"micro_batch": GLOBAL_BATCH, "rank": 0, "world_size": 1} | settings)


def global_batches(source, section, steps, world_size=1, micro_batch=GLOBAL_BATCH, position=0, **changes):
    """Images, labels and positions of whole global batches, put together from what each rank is given."""
    loaders = [
        train_loader(
            source, section, world_size=world_size, micro_batch=micro_batch, rank=rank, position=position, **changes
        )
        for rank in range(world_size)
    ]
    accumulation = GLOBAL_BATCH // (world_size * micro_batch)
    for step in range(steps):
        assert {loader.position for loader in loaders} == {position + step * GLOBAL_BATCH}
        batches = [next(loader) for loader in loaders for _ in range(accumulation)]
        assert all(batch.is_real.all() and len(batch.positions) == micro_batch for batch in batches)
        yield (
            torch.cat([batch.images for batch in batches]),
            torch.cat([batch.labels for batch in batches]),
            [position for batch in batches for position in batch.positions],
        )
    for loader in loaders:
        assert loader.wait_seconds > 0
        loader.close()


@pytest.fixture(scope="module", params=[0.0, 0.4], ids=["plain", "mixup"])
def stream(request, digits):
    return request.param, list(global_batches(digits, DataSection(DIGITS, mixup=request.param), STEPS))


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "workers", "from_step"),
    [(1, 48, 2, 0), (1, 16, 0, 7), (2, 8, 0, 0), (2, 24, 2, 8), (4, 3, 0, 0), (4, 12, 2, 7), (3, 1, 0, 6)],
)
def test_the_stream_is_one_for_any_world_workers_and_resume(
    stream, digits, world_size, micro_batch, workers, from_step
):
    mixup, expected = stream
    section = DataSection(DIGITS, mixup=mixup, num_workers=workers)
    got = global_batches(digits, section, STEPS - from_step, world_size, micro_batch, from_step * GLOBAL_BATCH)
    for (images, labels, positions), (images0, labels0, positions0) in zip(got, expected[from_step:], strict=True):
        assert positions == positions0
        assert torch.equal(images, images0)
        assert torch.equal(labels, labels0)


SKIPPED = [(0, 1), (3, 5), (4, 6), (7, 8)]  # in global batches; batches 1, 2, 6, 8 are left


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "workers", "from_batch"),
    [(1, 48, 2, 0), (1, 16, 0, 3), (2, 8, 0, 1), (2, 24, 2, 5), (4, 3, 0, 0), (4, 12, 2, 7), (3, 1, 0, 2)],
)
def test_skipped_ranges_leave_the_rest_of_the_stream_as_it_was(
    stream, digits, world_size, micro_batch, workers, from_batch
):
    mixup, expected = stream
    left = [batch for batch in (1, 2, 6, 8) if batch >= from_batch]
    section = DataSection(DIGITS, mixup=mixup, num_workers=workers)
    accumulation = GLOBAL_BATCH // (world_size * micro_batch)
    loaders = [
        train_loader(
            digits, section, world_size=world_size, micro_batch=micro_batch, rank=rank, position=from_batch * GLOBAL_BATCH,
            skipped=[[start * GLOBAL_BATCH, end * GLOBAL_BATCH] for start, end in SKIPPED],
        )
        for rank in range(world_size)
    ]  # fmt: skip
    for batch in left:
        assert {loader.position for loader in loaders} == {batch * GLOBAL_BATCH}
        got = [next(loader) for loader in loaders for _ in range(accumulation)]
        images, labels, positions = expected[batch]
        assert [position for one in got for position in one.positions] == positions
        assert torch.equal(torch.cat([one.images for one in got]), images)
        assert torch.equal(torch.cat([one.labels for one in got]), labels)
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize(("position", "skipped"), [(0, [(0, 50)]), (10, [(48, 96)]), (0, [(12, 48)])])
def test_only_whole_global_batches_can_be_skipped(digits, position, skipped):
    with pytest.raises(AssertionError, match="batches of 48"):
        train_loader(digits, DataSection(DIGITS), position=position, skipped=skipped)


def test_keys_are_the_names_of_the_images_at_positions(digits, damaged, tmp_path):
    loader = train_loader(digits, DataSection(DIGITS))
    wanted = [digits.read(order(5, position, 360))[2] for position in (3, 361, 0)]
    assert loader.keys([3, 361, 0]) == wanted
    assert loader.keys([]) == []
    loader = train_loader(build_source(damaged, "train"), DataSection(damaged), global_batch=20, micro_batch=20)
    assert sorted(loader.keys(range(20)))[3] == "a/03.png"  # also of an image that cannot be decoded


def test_keys_of_images_that_cannot_be_read_are_their_numbers():
    source = MultiLabel()
    loader = train_loader(source, DataSection(SourceSection("synthetic")), global_batch=4, micro_batch=4)
    source.labels = ([], [], [])
    keys = loader.keys([next(p for p in range(4) if order(5, p, 4) == 3)])
    assert keys == ["image 3 (cannot be read: tuple index out of range)"]


def test_the_stream_is_what_order_says(digits):
    section = DataSection(SourceSection("digits", split="eval", transforms=[]))
    for images, labels, positions in global_batches(digits, section, STEPS):
        for image, label, position in zip(images, labels, positions, strict=True):
            pixels, expected_label, _ = digits.read(order(5, position, 360))
            assert label == expected_label
            assert all(np.array_equal(channel, pixels) for channel in image)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64


def test_mixup_is_the_reference_formula(digits):
    plain = global_batches(digits, DataSection(DIGITS), 3)
    mixed = global_batches(digits, DataSection(DIGITS, mixup=0.4), 3)
    for step, ((images, labels, _), (mixed_images, mixed_labels, _)) in enumerate(zip(plain, mixed, strict=True)):
        weight = mixup_weight(5, step, 0.4)
        assert 0.5 <= weight <= 1
        partner = torch.arange(GLOBAL_BATCH).view(-1, 2).flip(1).flatten()
        images, hot = images.double() / 127.5 - 1, torch.eye(10, dtype=torch.float64)[labels]
        expected = weight * images + (1 - weight) * images[partner]
        torch.testing.assert_close(mixed_images.double(), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(mixed_labels.double(), weight * hot + (1 - weight) * hot[partner], atol=1e-6, rtol=0)
    assert mixed_images.dtype == mixed_labels.dtype == torch.float32


def test_mixup_weights_are_the_larger_half_of_beta():
    weights = [mixup_weight(0, step, 1.0) for step in range(4000)]
    assert min(weights) >= 0.5
    assert abs(np.mean(weights) - 0.75) < 0.01
    assert len(set(weights)) == 4000


class MultiLabel(Source):
    """Four grey images with no, one, two and a repeated label."""

    keys = ()
    multi_label = True
    num_classes = 5
    class_names = tuple("abcde")
    labels = ([], [4], [0, 2], [1, 1])

    def __len__(self):
        return 4

    def read(self, index):
        return np.full((8, 8), index, np.uint8), self.labels[index], str(index)


def test_lists_of_labels_become_multi_hot():
    section = DataSection(SourceSection("synthetic", transforms=[]), SourceSection("synthetic", transforms=[]))
    settings = {"image_size": 8, "num_classes": 5, "rank": 0, "world_size": 1}
    (batch,) = EvalLoader(MultiLabel(), section, batch=6, **settings)
    expected = [[0, 0, 0, 0, 0], [0, 0, 0, 0, 1], [1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0] * 5, [0] * 5]
    assert batch.labels.tolist() == expected
    batch = next(train_loader(MultiLabel(), section, num_classes=5, global_batch=4, micro_batch=4))
    assert batch.labels.tolist() == [expected[order(5, position, 4)] for position in range(4)]


@pytest.fixture
def damaged(tmp_path):
    """Twenty images in two classes, of which numbers 3, 4 and 11 by index cannot be decoded."""
    for index in range(20):
        path = tmp_path / ("a" if index < 10 else "b") / f"{index:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8), 10 * index).save(path)
        if index in (3, 4, 11):
            path.write_bytes(path.read_bytes()[:40])
    return SourceSection("folder", path=str(tmp_path), transforms=[])


def test_undecodable_images_are_replaced_by_the_next(damaged):
    source = build_source(damaged, "train")
    for workers in (0, 2):
        section = DataSection(damaged, num_workers=workers)
        loader = train_loader(source, section, global_batch=20, micro_batch=20)
        for _ in range(2):
            batch = next(loader)
            for image, label, position in zip(batch.images, batch.labels, batch.positions, strict=True):
                index = order(5, position, 20)
                index = {3: 5, 4: 5, 11: 12}.get(index, index)
                assert (image == 10 * index).all()
                assert label == index // 10
        loader.close()
        assert sorted(bad.key for bad in loader.bad_samples) == ["a/03.png", "a/04.png", "b/11.png"]
        for bad in loader.bad_samples:
            assert bad.reason
            assert order(5, bad.position, 20) in (3, 4, 11)


def test_a_source_without_one_good_image_stops_the_run(tmp_path):
    (tmp_path / "a").mkdir()
    for index in range(3):
        (tmp_path / "a" / f"{index}.jpg").write_bytes(b"not found")
    section = SourceSection("folder", path=str(tmp_path))
    loader = train_loader(build_source(section, "train"), DataSection(section), global_batch=2, micro_batch=2)
    with pytest.raises(UserError, match=r"all 3 images cannot be used .*a/\d.jpg"):
        next(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_failures_of_storage_and_labels_reach_the_consumer(damaged, digits, workers, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "RETRY_AFTER_SECONDS", ())
    source = build_source(damaged, "train")
    (tmp_path / "b" / "15.png").unlink()
    loader = train_loader(source, DataSection(damaged, num_workers=workers), global_batch=20, micro_batch=20)
    with pytest.raises(storage.StorageError, match=r"^\S*/b/15.png: cannot be read [^\n]*$"):  # no worker's traceback
        next(loader)
    loader.close()
    section = DataSection(SourceSection("digits", transforms=["flip_lr"]), num_workers=workers)
    loader = train_loader(digits, section, image_size=16)
    with pytest.raises(UserError, match=r"^vitds.data.train.transforms: digits/\d+ comes out 8×8, "):
        next(loader)
    loader.close()
    with pytest.raises(UserError, match=r"vitds.model.num_classes is 9"):
        train_loader(digits, section, num_classes=9)
    wrong = MultiLabel()
    wrong.labels = ([], [5], [], [])
    loader = train_loader(wrong, section, num_classes=5, global_batch=4, micro_batch=4)
    assert (next(loader).labels != 5).all()
    assert [bad.reason for bad in loader.bad_samples] == ["label 5 is not one of the model's 5 classes"]
    loader.close()


@pytest.mark.parametrize(
    ("world_size", "batch", "workers"), [(1, 64, 0), (2, 50, 0), (3, 7, 1), (4, 90, 0), (5, 100, 0)]
)
def test_evaluation_covers_every_image_once(digits, world_size, batch, workers):
    section = DataSection(DIGITS, SourceSection("digits", transforms=["resize"]), num_workers=workers)
    loaders = [
        EvalLoader(digits, section, image_size=8, num_classes=10, batch=batch, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert {len(loader) for loader in loaders} == {math.ceil(360 / (batch * world_size))}
    for _ in range(2):  # a second evaluation is the first again
        seen = []
        for loader in loaders:
            number = 0
            for b in loader:
                number += 1
                assert len(b.images) == batch
                for image, label, index, is_real in zip(b.images, b.labels, b.positions, b.is_real, strict=True):
                    assert is_real == (index >= 0)
                    if is_real:
                        assert np.array_equal(image[0], digits.images[index])
                        assert label == digits.labels[index]
                        seen.append(index)
            assert number == len(loader)
        assert sorted(seen) == list(range(360))


def test_evaluation_leaves_undecodable_images_out(damaged):
    loader = EvalLoader(
        build_source(damaged, "eval"), DataSection(damaged, damaged), image_size=8, num_classes=2, batch=8, rank=0,
        world_size=1,
    )  # fmt: skip
    left_out = [index for b in loader for index, real in zip(b.positions, b.is_real, strict=True) if not real]
    assert left_out == [3, 4, 11, -1, -1, -1, -1]
    assert [(bad.key, bad.position) for bad in loader.bad_samples] == [
        ("a/03.png", 3),
        ("a/04.png", 4),
        ("b/11.png", 11),
    ]


def test_workers_end_and_leave_the_process_as_it_was(digits):
    state = torch.get_rng_state()
    loader = train_loader(digits, DataSection(DIGITS, num_workers=2))
    next(loader)
    assert len(multiprocessing.active_children()) >= 2
    loader.close()
    assert not multiprocessing.active_children()
    evaluation = EvalLoader(
        digits, DataSection(DIGITS, DIGITS, num_workers=1), image_size=8, num_classes=10, batch=8, rank=0, world_size=1
    )
    for _ in evaluation:
        break  # an evaluation given up half way
    assert not multiprocessing.active_children()
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_obey_their_rank_alone(digits):
    loader = train_loader(digits, DataSection(DIGITS, num_workers=2))
    for _ in range(2):  # one from each, so that both have begun
        next(loader)
    workers = multiprocessing.active_children()
    subprocess.run(["kill", "-TERM", *[str(worker.pid) for worker in workers]], check=True)  # as a scheduler does
    for _ in range(20):
        next(loader)
    assert all(worker.is_alive() for worker in workers)
    for worker in workers:
        worker.terminate()
        worker.join(timeout=5)
    assert not any(worker.is_alive() for worker in workers)
    loader.close()


def test_model_range():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    out = to_model_range(images, "cpu")
    torch.testing.assert_close(out.double(), images.double() / 127.5 - 1, atol=1e-7, rtol=0)
    assert out.min() == -1
    assert out.max() == 1
    assert to_model_range(out, "cpu") is out
