"""The training stream through the loader itself: one for every order, source, number of ranks and workers, and resume.

Sixty images in global batches of eight: one epoch ends within a batch, the next one between two.
"""

import io
import itertools
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from vitds.data import DataSection, SourceSection, TrainLoader, build_source
from vitds.data.order import build_order
from vitds.data.section import OrderSection

NUM_IMAGES, GLOBAL_BATCH, STEPS, SEED = 60, 8, 15, 5
SHARDS = (41, 0, 19)
"""Images in each tar shard: uneven, one empty, and fewer than ranks."""
ORDERS = {
    "full": OrderSection("full"),
    "windowed": OrderSection("windowed", run_images=4, block_images=12, window_blocks=2),
    "uneven": OrderSection("windowed", run_images=7, block_images=14, window_blocks=3),
}


def image_file(index):
    rng = np.random.default_rng(index)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same images in the same order as class folders of ten and as shards."""
    root = tmp_path_factory.mktemp("images")
    files = [image_file(index) for index in range(NUM_IMAGES)]
    for index, file in enumerate(files):
        (root / "folder" / str(index // 10)).mkdir(parents=True, exist_ok=True)
        (root / "folder" / str(index // 10) / f"{index:02}.png").write_bytes(file)
    (root / "tar").mkdir()
    numbers = iter(range(NUM_IMAGES))
    for shard, count in enumerate(SHARDS):
        with tarfile.open(root / "tar" / f"{shard}.tar", "w") as tar:
            for index in itertools.islice(numbers, count):
                for name, data in ((f"{index:02}.png", files[index]), (f"{index:02}.cls", str(index // 10).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return root


def train_loader(
    places, source, order, transforms, *, world_size=1, rank=0, micro_batch=GLOBAL_BATCH, workers=0, step=0
):
    section = SourceSection(source, path=str(places / source), transforms=transforms)
    return TrainLoader(
        build_source(section, "train"), DataSection(section, order=ORDERS[order], num_workers=workers), image_size=8,
        num_classes=6, seed=SEED, global_batch=GLOBAL_BATCH, micro_batch=micro_batch, rank=rank, world_size=world_size,
        position=step * GLOBAL_BATCH,
    )  # fmt: skip


def global_batches(places, source, order, *, steps=STEPS, world_size=1, micro_batch=GLOBAL_BATCH, **start):
    """(images, labels, positions) of each global batch, put together from what every rank is given."""
    settings = {"world_size": world_size, "micro_batch": micro_batch} | start
    loaders = [
        train_loader(places, source, order, ["inception_crop", "flip_lr"], rank=rank, **settings)
        for rank in range(world_size)
    ]
    try:
        for _ in range(steps):
            parts = [
                (batch.images.clone(), batch.labels.clone(), batch.positions)
                for loader in loaders
                for batch in (next(loader) for _ in range(GLOBAL_BATCH // (world_size * micro_batch)))
            ]
            images, labels, positions = zip(*parts, strict=True)
            yield torch.cat(images), torch.cat(labels), [position for part in positions for position in part]
    finally:
        for loader in loaders:
            loader.close()


@pytest.fixture(scope="module", params=ORDERS)
def stream(request, places):
    return request.param, list(global_batches(places, "folder", request.param))


def assert_same(found, expected):
    for (images, labels, positions), (images0, labels0, positions0) in zip(found, expected, strict=True):
        assert positions == positions0
        assert torch.equal(labels, labels0)
        assert torch.equal(images, images0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (2, 2), (4, 2)])
@pytest.mark.parametrize("source", ["folder", "tar"])
def test_ranks_and_workers_and_sources_change_nothing(stream, places, source, world_size, micro_batch, workers):
    order, expected = stream
    found = global_batches(places, source, order, world_size=world_size, micro_batch=micro_batch, workers=workers)
    assert_same(found, expected)


@pytest.mark.parametrize(("source", "world_size", "workers"), [("folder", 1, 0), ("tar", 2, 0), ("tar", 4, 1)])
def test_a_resume_at_any_step_goes_on_with_it(stream, places, source, world_size, workers):
    order, expected = stream
    for step in range(STEPS) if not workers else (7, 8):
        found = global_batches(
            places, source, order, world_size=world_size, micro_batch=2, workers=workers, step=step, steps=min(3, STEPS - step)
        )  # fmt: skip
        assert_same(found, expected[step : step + 3])


@pytest.mark.parametrize("order", ORDERS)
def test_each_epoch_holds_each_image_once_with_its_label(places, order):
    """Told by its pixels, which no index or position could feign."""
    index_of = {}
    for index in range(NUM_IMAGES):
        pixels = np.asarray(Image.open(io.BytesIO(image_file(index))))
        index_of[pixels[2:10, 1:9].tobytes()] = index
    loader = train_loader(places, "tar", order, ["central_crop"])
    seen = []
    for batch in itertools.islice(loader, STEPS):
        for image, label in zip(batch.images, batch.labels.tolist(), strict=True):
            seen.append(index_of[image.permute(1, 2, 0).numpy().tobytes()])
            assert label == seen[-1] // 10
    for epoch in (seen[:NUM_IMAGES], seen[NUM_IMAGES:]):
        assert Counter(epoch) == Counter(range(NUM_IMAGES))
    assert seen == build_order(ORDERS[order], SEED, NUM_IMAGES).indices(np.arange(STEPS * GLOBAL_BATCH)).tolist()
