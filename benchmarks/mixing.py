"""How well the windowed order mixes, and what it saves in reads, beside the full permutation.

    python benchmarks/mixing.py [--batch 4096] [--seed 0]            the tables, for a set of ImageNet's size
    python benchmarks/mixing.py --train RUNS [--steps 800] [--seeds 0 1]    trains on digits sorted by class, in RUNS/

In storage sorted by class, neighbours have the same label: the worst case. In shuffled storage, as `vitds data pack`
makes it, they are strangers, and all that a windowed order loses is what "again" tells.

    classes       distinct classes in a global batch, mean
    spread        variance of the number of images that a class has in a batch, beside the full permutation's: a batch
                  mixes the classes as well as a full one of 1/spread of its images would
    neighbours    chance that two images of a batch lie within 1000 of each other in storage
    again         chance that two images that share a batch in one epoch share one in the next
    reads         separate reads for a rank's 64 images: neighbours with gaps ≤ 64 KiB are one
    piece         mean bytes of a read
    mount         bytes fetched by a mount that fetches in pieces of 4 MiB and keeps none, beside the images' own bytes
    time          of the order itself, for each position, in batches of the global size
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitds.data.order import FullOrder, Order, WindowedOrder

NUM_IMAGES, NUM_CLASSES = 1_281_167, 1000
MICRO_BATCH = 64
NEAR = 1000
GAP, MOUNT_PIECE = 1 << 16, 1 << 22
WINDOWED = (
    (16, 1024, 64), (1, 1024, 64), (4, 1024, 64), (64, 1024, 64), (16, 1024, 16), (16, 1024, 256), (16, 128, 512),
    (16, 8192, 8),
)  # fmt: skip
"""(run_images, block_images, window_blocks); the first is the default."""


class AsStored:
    """No shuffling at all."""

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images

    def indices(self, positions: np.ndarray) -> np.ndarray:
        return positions % self.num_images


def orders(seed: int, num_images: int) -> dict[str, Order]:
    windowed = {", ".join(map(str, sizes)): WindowedOrder(seed, num_images, *sizes) for sizes in WINDOWED}
    return {"full": FullOrder(seed, num_images), **windowed, "as stored": AsStored(num_images)}


def pairs(counts: np.ndarray) -> float:
    """Number of pairs within groups of these sizes."""
    return float((counts * (counts - 1.0) / 2).sum())


def class_mixing(batches: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Of batches of indices (S, B): distinct classes, mean, and the variance of a class's count."""
    counts = np.stack([np.bincount(labels[batch], minlength=NUM_CLASSES) for batch in batches])
    return float((counts > 0).sum(1).mean()), float(counts.var(axis=0).mean())


def near_pairs(batches: np.ndarray) -> float:
    """The part of all pairs of a batch that lie within NEAR in storage."""
    ordered = np.sort(batches, axis=1)
    near = sum(
        int((np.searchsorted(row, row + NEAR, side="right") - np.arange(1, len(row) + 1)).sum()) for row in ordered
    )
    return near / (len(batches) * pairs(np.array([batches.shape[1]])))


def met_again(first: np.ndarray, second: np.ndarray, batch: int) -> float:
    """The part of the pairs of images in one batch of the first epoch (N,) that are in one of the second, too."""
    batch_of = np.empty((2, len(first)), dtype=np.int64)
    for epoch, indices in enumerate((first, second)):
        batch_of[epoch, indices] = np.arange(len(indices)) // batch
    _, both = np.unique(batch_of[0] * (len(first) // batch + 1) + batch_of[1], return_counts=True)
    return pairs(both) / pairs(np.bincount(batch_of[0]))


def reading(batches: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> tuple[float, float, float]:
    """Of a rank's batches (S, 64): reads in each, mean bytes of a read, bytes a mount fetches over bytes wanted."""
    reads = fetched = 0
    for batch in np.sort(batches, axis=1):
        begin, end = starts[batch], starts[batch] + sizes[batch]
        reads += 1 + int((begin[1:] - end[:-1] > GAP).sum())
        touched = [np.arange(b // MOUNT_PIECE, (e - 1) // MOUNT_PIECE + 1) for b, e in zip(begin, end, strict=True)]
        fetched += len(np.unique(np.concatenate(touched))) * MOUNT_PIECE
    wanted = float(sizes[batches].sum())
    return reads / len(batches), wanted / reads, fetched / wanted


def time_of(order: Order, batch: int) -> float:
    """Seconds that the order takes for one position; median of 50 global batches."""
    taken = []
    for step in range(50):
        positions = step * batch + np.arange(batch)
        start = time.perf_counter()
        order.indices(positions)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) / batch


COLUMNS = (
    "order", "classes, sorted", "shuffled", "spread, sorted", "shuffled", "neighbours", "again", "reads", "piece", "mount",
    "time",
)  # fmt: skip


def tables(batch: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.lognormal(np.log(110_000) - 0.18, 0.6, NUM_IMAGES).astype(np.int64)  # bytes; mean 110 kB
    starts = np.cumsum(sizes + 2048) - sizes  # headers and a label between them
    by_class = np.arange(NUM_IMAGES) * NUM_CLASSES // NUM_IMAGES
    steps = NUM_IMAGES // batch
    # Micro batches begin and end within runs there; in the first epoch, with runs.
    in_second_epoch = (NUM_IMAGES // MICRO_BATCH + 1) * MICRO_BATCH + np.arange(2000 * MICRO_BATCH)
    mean = f"{sizes.mean() / 1e3:.0f} kB"
    print(f"{NUM_IMAGES} images in {NUM_CLASSES} classes, {mean} each, global batch {batch}, seed {seed}\n")
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    base: dict[str, float] = {}
    for name, order in orders(seed, NUM_IMAGES).items():
        first, second = (order.indices(epoch * NUM_IMAGES + np.arange(NUM_IMAGES)) for epoch in (0, 1))
        batches = first[: steps * batch].reshape(steps, batch)
        micro_batches = order.indices(in_second_epoch).reshape(-1, MICRO_BATCH)
        cells, spreads = [], []
        for storage, labels in (("sorted", by_class), ("shuffled", rng.permutation(by_class))):
            classes, variance = class_mixing(batches, labels)
            base.setdefault(f"classes {storage}", classes)
            base.setdefault(f"variance {storage}", variance)
            cells.append(f"{classes:.0f} ({classes / base[f'classes {storage}']:.3f})")
            spreads.append(f"{variance / base[f'variance {storage}']:.2f}")
        reads, piece, mount = reading(micro_batches, starts, sizes)
        cells += [
            *spreads, f"{near_pairs(batches):.2%}", f"{met_again(first, second, batch):.2%}", f"{reads:.1f}",
            f"{piece / 1e6:.2f} MB", f"×{mount:.1f}", f"{time_of(order, batch) * 1e9:.0f} ns",
        ]  # fmt: skip
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


TRAINED = (
    ("sorted", "full", None),
    ("sorted", "windowed, runs of 1, 8 blocks of 24", (1, 24, 8)),
    ("sorted", "windowed, runs of 4, 8 blocks of 24", (4, 24, 8)),
    ("sorted", "windowed, runs of 16, 4 blocks of 48", (16, 48, 4)),
    ("sorted", "as stored, from a place drawn each epoch", (1437, 1437, 1)),
    ("mixed", "windowed, runs of 16, 4 blocks of 48", (16, 48, 4)),
    ("mixed", "as stored, from a place drawn each epoch", (1437, 1437, 1)),
)
"""(storage, order, (run_images, block_images, window_blocks)) of runs on the 1437 digits, which were written mixed."""


def write_digits(root: Path) -> None:
    """The training digits as PNGs in class folders: sorted by class, as a folder is."""
    from PIL import Image

    from vitds.data import SourceSection, build_source

    digits = build_source(SourceSection("digits"), "train")
    for index, (pixels, label, _) in enumerate(digits.read(i) for i in range(len(digits))):
        path = root / digits.class_names[label] / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def order_section(sizes: tuple[int, int, int] | None) -> dict[str, str | int]:
    if sizes is None:
        return {"kind": "full"}
    return {"kind": "windowed", **dict(zip(("run_images", "block_images", "window_blocks"), sizes, strict=True))}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def trained(run_file: dict[str, Any], place: Path) -> tuple[float, float, float]:
    """Top-1, evaluation loss and mean training loss of the last quarter, of one run in `place`."""
    place.with_suffix(".json").write_text(json.dumps(run_file))
    trainer = Path(__file__).resolve().parent.parent / "launcher" / "train.py"
    command = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "1", "--master_port", free_port(), trainer]
    command += ["--config", place.with_suffix(".json"), "--output-dir", place]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    late = [row["train/loss"] for row in rows if "train/loss" in row and row["step"] > 3 * rows[-1]["step"] // 4]
    last = next(row for row in reversed(rows) if "eval/top1" in row)
    return last["eval/top1"], last["eval/loss"], statistics.mean(late)


def train(root: Path, steps: int, seeds: Sequence[int]) -> None:
    """One run for each storage, order and seed: the digits' own run file, with a smaller model and `steps`."""
    write_digits(root / "sorted")
    run_file = json.loads((Path(__file__).resolve().parent.parent / "ds_configs" / "digits.json").read_text())
    schedule = {"warmup_steps": steps // 10, "timescale_steps": steps // 5, "cooldown_steps": steps // 3}
    run_file["scheduler"]["params"] = schedule
    settings = run_file["vitds"]
    settings["model"] |= {"depth": 2, "patch_size": 4}
    settings["train"] |= {"total_steps": steps, "eval_every_steps": steps, "diagnostics_every_steps": 2 * steps}
    settings["checkpoint"]["every_steps"] = steps
    print(f"digits, {steps} steps of {run_file['train_batch_size']}, seeds {' '.join(map(str, seeds))}\n")
    print("| storage | order | top-1 | evaluation loss | training loss, last quarter |\n|---|---|---|---|---|")
    sources = {"sorted": {"source": "folder", "path": str(root / "sorted")}, "mixed": {"source": "digits"}}
    for number, (storage, name, sizes) in enumerate(TRAINED):
        found = []
        for seed in seeds:
            settings["data"]["order"] = order_section(sizes)
            settings["data"]["train"] = sources[storage] | {"transforms": settings["data"]["train"]["transforms"]}
            settings["train"]["seed"] = seed
            found.append(trained(run_file, root / f"{number}-{seed}"))
        columns = [" ".join(f"{value:.3f}" for value in column) for column in zip(*found, strict=True)]
        print(f"| {storage} | {name} | {' | '.join(columns)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=Path, metavar="RUNS")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.train.resolve(), arguments.steps, arguments.seeds)
    else:
        tables(arguments.batch, arguments.seed)


if __name__ == "__main__":
    main()
