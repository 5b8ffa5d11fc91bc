"""`vitds data bench`: measure what a run's images cost to prepare, and say whether the loader or the device will wait."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from vitds import dist
from vitds.data import Source, TrainLoader, augmentation_rng
from vitds.data.images import LazyJpeg, Unusable
from vitds.data.loader import build_images
from vitds.data.order import build_order
from vitds.data.samples import Images, rgb, rows_of
from vitds.data.source import Sample
from vitds.data.transforms import RESIZING, central_crop, random_crop
from vitds.data_verbs.arguments import at_least_one, open_role, share
from vitds.errors import UserError, one_of
from vitds.metrics.speed import PEAKS_16_BIT, Peak, device_peak, named_peak
from vitds.progress import Progress

STAGES = ("read", "decode", "crop and resize", "other transforms", "collate", "transfer")
CROPS = (*RESIZING, central_crop, random_crop)
DEFAULT_DEVICE = "H100"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `vitds data bench` takes."""
    parser.add_argument("--config", required=True, help="run file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for training")
    parser.add_argument("--images", type=at_least_one, default=512, metavar="N", help="measured; 512 when absent")
    parser.add_argument("--workers", type=_numbers, default=[0, 1, 2], metavar="N,N,…",
                        help="numbers of workers of one rank to measure; 0,1,2 when absent")  # fmt: skip
    parser.add_argument("--gpus-per-host", type=at_least_one, default=8, metavar="N", help="8 when absent")
    parser.add_argument("--device", metavar="NAME", help=f"GPU that is to train: {DEFAULT_DEVICE}, A100, …; this host's, "
                        f"or else {DEFAULT_DEVICE}, when absent")  # fmt: skip
    parser.add_argument(
        "--peak-tflops", type=_positive, metavar="X", help="its dense TFLOP/s in the training precision"
    )
    parser.add_argument("--mfu", type=share, default=0.5, metavar="X", help="part of that which it reaches; 0.5 when absent")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def run(options: argparse.Namespace, load: Callable[..., Any]) -> int:
    """Measure and print; the exit code, 0 whatever the verdict.

    Raises:
        UserError: a run file or images that cannot be used, or a device whose peak is not known.
        StorageError: the storage failed, several times over.
    """
    # Here, because transformers would cost the other verbs four seconds.
    from vitds.models import build_config, flops_per_image

    run_file = load(options.config, options.set, world_size=None)
    peak = peak_of(run_file, options.device, options.peak_tflops)
    source, part = open_role(run_file, "train"), run_file.vitds
    images = build_images(source, part.data, "train", part.model.image_size, part.model.num_classes)
    torch.set_num_threads(1)  # as a worker has it
    seconds = Stages(images, build_order(part.data.order, part.train.seed, len(source))).measure(options.images)
    rates = {workers: loader_rate(run_file, source, workers, options.images) for workers in options.workers}
    needed = options.mfu * peak.flops / (3 * flops_per_image(build_config(part.model)))
    found = {
        "microseconds_per_image": {stage: 1e6 * spent for stage, spent in seconds.items()},
        "images_per_second_by_workers": rates,
        "device": peak.name,
        **verdict(rates, seconds, needed, options.gpus_per_host, len(os.sched_getaffinity(0)), part.data.num_workers),
    }
    print(json.dumps(found, indent=2, ensure_ascii=False) if options.json else "\n".join(described(found, options.mfu)))
    return 0


class Stages:
    """What the images at the first positions of a run cost, stage by stage, in this process."""

    def __init__(self, images: Images, order: Any) -> None:
        self._images, self._order = images, order
        self._seconds = dict.fromkeys(STAGES, 0.0)

    def measure(self, count: int, chunk: int = 64) -> dict[str, float]:
        """Seconds an image of each stage. Images that cannot be used are passed over."""
        total = min(count, len(self._images.source))
        with Progress("measuring", total) as progress:
            for first in range(0, total, chunk):
                size = min(chunk, total - first)
                samples = self._timed("read", self._read, np.arange(first, first + size))
                pictures = [self._pixels(sample, first + i) for i, sample in enumerate(samples)]
                self._collate([pixels for pixels in pictures if pixels is not None])
                progress.add(size)
        if dist.device().type != "cuda":
            del self._seconds["transfer"]
        return {stage: spent / total for stage, spent in self._seconds.items()}

    def _read(self, positions: np.ndarray) -> list[Sample]:
        return self._images.source.read_many(self._order.indices(positions).tolist())

    def _pixels(self, sample: Sample, position: int) -> np.ndarray | None:
        rng = augmentation_rng(0, position)
        picture: Any = sample[0]
        try:
            if isinstance(picture, bytes):
                picture = self._timed("decode", self._images.decode, picture)
            if isinstance(picture, LazyJpeg):  # is decoded when the crop is known, inside the first transform
                decoded = picture.decoded
                picture.decoded = lambda smaller=1: self._timed("decode", decoded, smaller)  # type: ignore[method-assign]
            for transform in self._images.transforms:
                before, start = self._seconds["decode"], time.perf_counter()
                picture = transform(picture, rng)
                spent = time.perf_counter() - start - (self._seconds["decode"] - before)
                crops = getattr(transform, "func", transform) in CROPS
                self._seconds["crop and resize" if crops else "other transforms"] += spent
            return self._timed("collate", np.asarray, picture)
        except Unusable:
            return None

    def _collate(self, pictures: list[np.ndarray]) -> None:
        size = self._images.image_size
        batch = torch.zeros(len(pictures), size, size, 3, dtype=torch.uint8)  # its pages are there, as a slot's are
        start = time.perf_counter()
        for row, pixels in zip(rows_of(batch.permute(0, 3, 1, 2)), pictures, strict=True):
            row[...] = rgb(pixels)
        self._seconds["collate"] += time.perf_counter() - start
        if dist.device().type == "cuda":
            locked = batch.pin_memory()
            self._timed("transfer", locked.to, dist.device())

    def _timed(self, stage: str, action: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return action(*arguments)
        finally:
            self._seconds[stage] += time.perf_counter() - start


def loader_rate(run_file: Any, source: Source, workers: int, images: int) -> float:
    """Images/s of one rank's whole loader, once what workers had made before anybody asked is used up."""
    part = run_file.vitds
    section, micro_batch = dataclasses.replace(part.data, num_workers=workers), run_file.micro_batch
    loader = TrainLoader(
        source, section, image_size=part.model.image_size, num_classes=part.model.num_classes, seed=part.train.seed,
        global_batch=micro_batch, micro_batch=micro_batch, rank=0, world_size=1,
    )  # fmt: skip
    warm, timed = workers * section.prefetch + 1, max(1, -(-images // micro_batch))
    try:
        with Progress(f"loading with {workers} workers", (warm + timed) * micro_batch) as progress:
            for number in range(warm + timed):
                if number == warm:
                    start = time.perf_counter()
                next(loader)
                progress.add(micro_batch)
            return timed * micro_batch / (time.perf_counter() - start)
    finally:
        loader.close()


def peak_of(run_file: Any, device: str | None, peak_tflops: float | None) -> Peak:
    """The peak that the model is to be trained at.

    Raises:
        UserError: a device that is not in the table, or has no peak in the run file's precision.
    """
    train = run_file.vitds.train
    half = any(run_file.deepspeed.get(kind, {}).get("enabled") for kind in ("bf16", "fp16"))
    precision = "bf16" if half else "tf32" if train.tf32 else "fp32"
    given = train.peak_tflops if device is None and peak_tflops is None else peak_tflops
    peak = device_peak(dist.device(), precision, given) if device is None or given is not None else None
    peak = peak or named_peak(device or DEFAULT_DEVICE, precision)
    if peak is None and device is not None and named_peak(device, "bf16") is None:
        raise UserError(f"{one_of('--device', device, PEAKS_16_BIT)}; or give its peak by --peak-tflops")
    if peak is None:
        raise UserError(
            f"--device: the peak of {device or DEFAULT_DEVICE!r} in {precision} is not known; give it by --peak-tflops"
        )
    return peak


def verdict(
    rates: dict[int, float], seconds: dict[str, float], needed: float, gpus: int, cores: int, num_workers: int
) -> dict[str, Any]:
    """Who will wait for whom on a host, and what would help.

    Args:
        rates: images/s of one loader by its number of workers.
        seconds: an image's, by stage.
        needed: images/s that one GPU takes.
        cores: that this process may use.
        num_workers: of the run file.
    """
    parallel = [workers for workers in rates if 0 < workers <= cores]
    per_core = max((rates[workers] / workers for workers in parallel), default=max(rates.values()))
    on_host, cores_needed = gpus * needed, math.ceil(gpus * needed / per_core)
    free = max(0, cores - gpus)  # each rank keeps a core busy itself
    workers = math.ceil(needed / per_core)
    enough = cores_needed <= free
    advice = []
    if enough and max(1, num_workers) < workers:
        advice.append(f"vitds.data.num_workers of {workers} (it is {num_workers})")
    if not enough:
        total = sum(seconds.values())
        if seconds["read"] > 0.3 * total:
            advice.append("faster storage, or vitds.data.order.kind windowed on tar shards")
        if seconds["decode"] + seconds["crop and resize"] > 0.5 * total:
            advice.append("smaller files, where a shorter edge is more than twice the model's image size")
        advice.append("more cores to a GPU")
    return {
        "images_per_second_per_gpu": needed,
        "images_per_second_per_host": on_host,
        "images_per_second_per_core": per_core,
        "cores": cores,
        "cores_needed": cores_needed,
        "bottleneck": "device" if enough else "loader",
        "verdict": (
            f"{gpus} GPUs take {on_host:.0f} images/s, which needs {cores_needed} cores; this host has {cores}, of which "
            f"the ranks leave {free}, for {free * per_core:.0f} images/s: the {'device' if enough else 'loader'} will be the bottleneck"
        ),
        "advice": advice,
    }


def described(found: dict[str, Any], mfu: float) -> list[str]:
    """For a reader."""
    stages = found["microseconds_per_image"]
    total = sum(stages.values())
    lines = [f"{stage:17} {spent:8.0f} µs an image {spent / total:5.0%}" for stage, spent in stages.items()]
    for workers, rate in found["images_per_second_by_workers"].items():
        lines.append(f"{workers} workers: {rate:.0f} images/s")
    lines.append(f"one GPU at an MFU of {mfu:g} ({found['device']}): {found['images_per_second_per_gpu']:.0f} images/s")
    lines.append(found["verdict"])
    return lines + ([f"what would help: {'; '.join(found['advice'])}"] if found["advice"] else [])


def _numbers(text: str) -> list[int]:
    if not all(part.isascii() and part.isdigit() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected whole numbers as in 0,1,2, found {text!r}")
    return sorted({int(part) for part in text.split(",")})


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value
