"""Images/s of the loader beside a plain webdataset pipeline and torch's ImageFolder way, on the same files in one run.

    python benchmarks/loader.py [--workers 0 1 2] [--rounds 5] [--batches 8] [--images 384]
        [--device cuda]

The files are noise with the spectrum of photographs, JPEGs of quality 90 and about 500 × 375 pixels (one in a hundred
2000 × 1500), as class folders and as tar shards. Everyone takes turns within each round, so that a noisy machine
disturbs all alike; a ratio is to our loader on the same files. Peers run twice: with their own usual transforms
(RandomResizedCrop's law, flip, float32 in [−1, 1]; ours leaves uint8, which the device converts), and with our crop, our
flip and uint8, so that the difference is the loaders' alone. With --device the batches are brought there, in the model's
range.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import multiprocessing
import os
import random
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from runner import Candidate, Column, compare, report, wait
from torch.utils.data import DataLoader, Dataset, RandomSampler

from vitds.data import DataSection, SourceSection, TrainLoader, augmentation_rng, build_source, to_model_range
from vitds.data.transforms import flip_lr, inception_crop

SIZE, BATCH, CLASSES, SHARDS = 224, 64, 8, 4


def photograph(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG of noise whose amplitude falls with frequency as in photographs, chroma fainter than luma."""
    frequency = np.hypot(np.fft.rfftfreq(width), np.fft.fftfreq(height)[:, None])
    frequency = np.maximum(frequency, 1 / max(width, height)) ** 1.15
    planes = []
    for strength in (1.0, 0.35, 0.25):
        noise = rng.standard_normal(frequency.shape) + 1j * rng.standard_normal(frequency.shape)
        plane = np.fft.irfft2(noise / frequency, (height, width))
        planes.append(strength * plane / plane.std())
    y, u, v = planes
    rgb = np.stack([y + 1.402 * v, y - 0.344 * u - 0.714 * v, y + 1.772 * u], axis=-1)
    file = io.BytesIO()
    Image.fromarray((128 + 55 * rgb).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_files(root: Path, images: int) -> None:
    """root/folder/CLASS/IMAGE.jpg and, in another order, root/shards/NUMBER.tar."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(images):
        width, height = int(rng.integers(430, 570)), int(rng.integers(310, 440))
        width, height = (2000, 1500) if i % 100 == 99 else (height, width) if i % 3 == 0 else (width, height)
        path = root / "folder" / f"class{i % CLASSES}" / f"{i:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photograph(rng, width, height))
        paths.append(path)
    (root / "shards").mkdir()
    order = rng.permutation(images)
    for shard, numbers in enumerate(np.array_split(order, SHARDS)):
        with tarfile.open(root / "shards" / f"{shard:06}.tar", "w") as tar:
            for number in numbers:
                path = paths[number]
                for name, data in (
                    (f"{number:06}.jpg", path.read_bytes()),
                    (f"{number:06}.cls", path.parent.name[5:].encode()),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def usual(image: Image.Image) -> torch.Tensor:
    """torchvision's RandomResizedCrop(224), RandomHorizontalFlip, ToTensor and Normalize(0.5, 0.5), written with Pillow."""
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(width, height)
    left, top = random.randint(0, width - w), random.randint(0, height - h)
    image = image.crop((left, top, left + w, top + h)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.float().div_(255).sub_(0.5).div_(0.5)


def ours(image: Image.Image) -> torch.Tensor:
    """Our crop and flip; uint8 (3, 224, 224)."""
    rng = augmentation_rng(0, random.getrandbits(40))
    picture = flip_lr(inception_crop(image, rng, size=SIZE), rng)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


class ImageFolder(Dataset[tuple[torch.Tensor, int]]):
    """As torchvision's: opened by path, converted to RGB, transformed one by one."""

    def __init__(self, root: Path, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.paths = sorted(root.glob("*/*.jpg"))
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with self.paths[index].open("rb") as file:
            image = Image.open(file).convert("RGB")
        return self.transform(image), int(self.paths[index].parent.name[5:])


def image_folder(root: Path, workers: int, transform: Callable[[Image.Image], torch.Tensor]) -> Iterator[Any]:
    dataset = ImageFolder(root / "folder", transform)
    sampler = RandomSampler(dataset, replacement=True, num_samples=10**6)
    return iter(DataLoader(dataset, BATCH, sampler=sampler, num_workers=workers, drop_last=True))


def web_dataset(root: Path, workers: int, transform: Callable[[Image.Image], torch.Tensor]) -> Iterator[Any]:
    import webdataset

    shards = sorted(map(str, (root / "shards").glob("*.tar")))
    dataset = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0).repeat().shuffle(200)
    dataset = dataset.decode("pil").to_tuple("jpg", "cls").map_tuple(transform, int).batched(BATCH)
    return iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=workers))


def vitds_loader(root: Path, workers: int, kind: str) -> TrainLoader:
    path = root / ("folder" if kind == "folder" else "shards")
    section = DataSection(SourceSection(kind, path=str(path)), num_workers=workers)
    return TrainLoader(
        build_source(section.train, "train"), section, image_size=SIZE, num_classes=CLASSES, seed=0, global_batch=BATCH,
        micro_batch=BATCH, rank=0, world_size=1,
    )  # fmt: skip


CONTESTANTS: dict[str, Callable[[Path, int], Any]] = {
    "vitds, folder": lambda root, workers: vitds_loader(root, workers, "folder"),
    "vitds, tar": lambda root, workers: vitds_loader(root, workers, "tar"),
    "ImageFolder": lambda root, workers: image_folder(root, workers, usual),
    "webdataset": lambda root, workers: web_dataset(root, workers, usual),
    "ImageFolder, our transforms": lambda root, workers: image_folder(root, workers, ours),
    "webdataset, our transforms": lambda root, workers: web_dataset(root, workers, ours),
}
"""An endless iterator over batches of 64, by name."""


def cpu_seconds() -> float:
    """Of this process and its living children; what others on the machine do disturbs it less than it does a clock."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def speed(
    begin: Callable[[Path, int], Any], root: Path, workers: int, batches: int, device: str | None
) -> dict[str, float]:
    """Images/s and ms of CPU an image, workers included, from the first batch on, which stands for what starting costs."""
    loader = begin(root, workers)
    take(next(loader), device)
    start, start_cpu = time.perf_counter(), cpu_seconds()
    for _ in itertools.repeat(None, batches):
        take(next(loader), device)
    wait(torch.device(device or "cpu"))
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - start_cpu
    end = getattr(loader, "close", None)
    if end is not None:
        end()
    return {"images/s": batches * BATCH / seconds, "cpu": 1000 * cpu / (batches * BATCH)}


def take(batch: Any, device: str | None) -> None:
    """Bring a batch to the device, if there is one to bring it to."""
    if device is not None:
        to_model_range(batch.images if hasattr(batch, "images") else batch[0], device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=8, help=f"of {BATCH} images, timed")
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--device", help="where batches are taken to, in the model's range, as the trainer does")
    parser.add_argument("--json", default="benchmarks/loader.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    columns = (Column("images/s", "images/s", ".0f"), Column("cpu", "ms of CPU an image", ".2f"))
    tables = []
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_files(root, arguments.images)
        for workers in arguments.workers:

            def candidate(name: str, workers: int = workers) -> Candidate:
                begin = CONTESTANTS[name]
                turn = partial(speed, begin, root, workers, arguments.batches, arguments.device)
                same_files = "vitds, tar" if "webdataset" in name else "vitds, folder"
                return Candidate(name, turn, None if name.startswith("vitds") else same_files)

            title = f"loader, {workers} workers, to the device: {arguments.device or 'no'}"
            candidates = [candidate(name) for name in CONTESTANTS]
            tables.append(compare(title, candidates, rounds=arguments.rounds, warmup=0, by="images/s", columns=columns))
            print(tables[-1].text(), flush=True)
    report(tables, arguments.json, arguments.device or "cpu")


if __name__ == "__main__":
    main()
