"""How batches come to the consumer: through memory shared with workers, and by a thread that copies them ahead."""

import gc
import itertools
import multiprocessing
import threading
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.test_loader import DIGITS, train_loader
from vitds.data import DataSection, EvalLoader, SourceSection, build_source, loader, slots, storage
from vitds.data.images import decode
from vitds.data.slots import Slots
from vitds.data.transforms import TRANSFORMS
from vitds.errors import UserError


@pytest.fixture(scope="module")
def digits():
    return build_source(DIGITS, "train")


@pytest.fixture
def made(monkeypatch):
    """Is released for each image that a worker makes, when the images before it are in their place."""
    made = multiprocessing.get_context("fork").Semaphore(0)

    def announce(image, rng):
        made.release()  # the images before this one are in their place
        return image

    monkeypatch.setitem(TRANSFORMS, "announce", announce)
    return made


@pytest.mark.parametrize(("accumulation", "workers", "prefetch"), [(1, 1, 1), (3, 2, 1), (4, 1, 2), (2, 2, 2)])
def test_the_batches_of_a_step_stay_as_they_are_while_workers_go_on(digits, made, accumulation, workers, prefetch):
    own = SourceSection("digits", split="eval", transforms=["announce"])
    section = DataSection(own, num_workers=workers, prefetch=prefetch)
    batches = train_loader(digits, section, micro_batch=8, global_batch=8 * accumulation)
    expected = train_loader(digits, DataSection(SourceSection("digits", transforms=[])), micro_batch=8,
                            global_batch=8 * accumulation)  # fmt: skip
    waited = 0
    for step in range(4):
        held = [next(batches) for _ in range(accumulation)]
        taken = (step + 1) * accumulation
        while waited < 8 * (taken + workers * prefetch):  # all that the workers may make until the next one is taken
            assert made.acquire(timeout=30)
            waited += 1
        for batch in held:
            other = next(expected)
            assert batch.positions == other.positions
            assert torch.equal(batch.images, other.images)
            assert torch.equal(batch.labels, other.labels)
            assert batch.is_real.all()
    assert not made.acquire(block=False)
    batches.close()


def test_slots_lie_apart_and_come_round_again():
    memory = Slots(3, 5000)
    for number in range(3):
        memory[number].fill_(number + 1)
    assert [int(memory[number].sum()) for number in range(3)] == [5000, 10000, 15000]
    assert memory[4].data_ptr() == memory[1].data_ptr()
    assert len(memory[0]) == 5000


def test_slots_that_do_not_fit_name_the_numbers(digits, monkeypatch):
    monkeypatch.setattr(slots, "available_bytes", lambda: 2**16)
    section = DataSection(DIGITS, num_workers=2, prefetch=3)
    with pytest.raises(UserError, match=r"num_workers: 7 batches of 0.0 MiB, .* are 0.00 GiB, .* 0.00 GiB left; lower"):
        train_loader(digits, section)


@pytest.fixture
def ahead(monkeypatch):
    monkeypatch.setattr(loader, "COPIED_AHEAD", ("cpu", "cuda"))


def running():
    return [thread for thread in threading.enumerate() if thread.name == "vitds-ahead"]


@pytest.mark.parametrize(("workers", "mixup"), [(0, 0.0), (2, 0.0), (1, 0.5)])
def test_batches_copied_ahead_are_the_same(digits, ahead, workers, mixup):
    expected = train_loader(digits, DataSection(DIGITS, mixup=mixup), micro_batch=24)
    assert running(), "the thread works before it is asked"
    batches = train_loader(digits, DataSection(DIGITS, mixup=mixup, num_workers=workers), micro_batch=24)
    kept = list(itertools.islice(batches, 9))  # copies of their own
    assert batches.position == 4 * 48
    assert batches.wait_seconds > 0
    batches.close()
    for batch, other in zip(kept, expected, strict=False):
        assert batch.positions == other.positions
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.labels, other.labels)
        assert batch.is_real.all()
    expected.close()
    assert not running()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_copied_ahead_ends_and_covers_all(digits, ahead, workers):
    section = DataSection(DIGITS, SourceSection("digits", transforms=[]), num_workers=workers)
    batches = EvalLoader(digits, section, image_size=8, num_classes=10, batch=50, rank=0, world_size=1)
    for _ in range(2):
        kept = list(batches)
        images = torch.cat([batch.images[batch.is_real] for batch in kept])
        assert len(kept) == 8
        np.testing.assert_array_equal(images[:, 1], digits.images)
    for _ in batches:
        break  # given up
    assert not running()
    assert not multiprocessing.active_children()


def test_an_evaluation_leaves_no_memory_behind(digits, ahead, monkeypatch):
    """Page-locked, and as much with each evaluation; nobody knows when the garbage collector comes."""
    made = []
    was = Slots.__init__
    monkeypatch.setattr(Slots, "__init__", lambda self, *sizes: (made.append(weakref.ref(self)), was(self, *sizes))[1])
    section = DataSection(DIGITS, DIGITS, num_workers=1)
    batches = EvalLoader(digits, section, image_size=8, num_classes=10, batch=50, rank=0, world_size=1)
    gc.disable()
    try:
        for _ in range(2):
            assert sum(1 for _ in batches) == len(batches)
            assert made.pop()() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("workers", [0, 1])
def test_what_fails_ahead_arrives_as_itself(digits, ahead, workers, monkeypatch, tmp_path):
    section = DataSection(SourceSection("digits", transforms=["flip_lr"]), num_workers=workers)
    batches = train_loader(digits, section, image_size=16)
    with pytest.raises(UserError, match=r"^vitds.data.train.transforms: digits/\d+ comes out 8×8, "):
        next(batches)
    batches.close()

    class Unplugged(type(digits)):
        def read(self, index):
            raise storage.StorageError("shelf 7: cannot be read")

    batches = train_loader(Unplugged(DIGITS, "train"), section, image_size=8)
    with pytest.raises(storage.StorageError, match=r"^shelf 7: cannot be read$"):
        next(batches)
    batches.close()

    class Broken(type(digits)):
        def read(self, index):
            raise ZeroDivisionError("of our own making")

    batches = train_loader(Broken(DIGITS, "train"), section, image_size=8)
    for _ in range(2):  # and does not wait for ever the second time
        with pytest.raises(ZeroDivisionError, match="of our own making"):
            next(batches)
    batches.close()
    assert not running()


def test_only_training_decodes_jpegs_small(tmp_path):
    (tmp_path / "a").mkdir()
    ramp = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(ramp).resize((800, 640), Image.Resampling.BICUBIC).save(tmp_path / "a" / "0.jpg", quality=90)
    own = SourceSection("folder", path=str(tmp_path), transforms=["resize"])
    source, section = build_source(own, "train"), DataSection(own, own)
    whole = np.asarray(decode((tmp_path / "a" / "0.jpg").read_bytes()).resize((32, 32), Image.Resampling.BILINEAR))
    (batch,) = EvalLoader(source, section, image_size=32, num_classes=1, batch=1, rank=0, world_size=1)
    np.testing.assert_array_equal(batch.images[0].permute(1, 2, 0), whole)
    batch = next(train_loader(source, section, image_size=32, global_batch=1, micro_batch=1))
    difference = np.abs(batch.images[0].permute(1, 2, 0).numpy().astype(int) - whole)
    assert 0 < difference.mean() < 1
