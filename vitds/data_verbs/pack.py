"""`vitds data pack`: write a folder of class folders as tar shards."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vitds.data import Source
from vitds.data.order import FullOrder
from vitds.data.storage import retried
from vitds.data_verbs.arguments import add_workers, at_least_one, open_folder
from vitds.data_verbs.packing import Packing, alone, cut, packed_bytes
from vitds.data_verbs.workers import each
from vitds.errors import UserError
from vitds.progress import Progress

FORMAT = 1
IMAGES_PER_SHARD = 10_000
STAT_THREADS = 16
UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `vitds data pack` takes."""
    parser.add_argument("--from", dest="folder", required=True, help="folder of one folder of images per class")
    parser.add_argument("--to", required=True, type=Path, help="directory of the shards, made where it is not there")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--images-per-shard", type=at_least_one, metavar="N", help=f"{IMAGES_PER_SHARD} by default")
    size.add_argument("--shard-bytes", type=_bytes, metavar="SIZE", help="most bytes of a shard, as in 1GB or 512MiB")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--shuffle", type=int, default=0, metavar="SEED", help="of the images' order; 0 by default")
    order.add_argument("--no-shuffle", dest="shuffle", action="store_const", const=None, help="keep the folder's order")
    parser.add_argument("--prefix", default="train", help="of the shards' names: train-000000.tar, …")
    parser.add_argument("--exclude", metavar="FILE", help="images to leave out, as `vitds data dedup` writes them")
    add_workers(parser)
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")


def run(options: argparse.Namespace, load: Callable[..., Any]) -> int:
    """Write the shards. Cut short, the same command goes on; when they are all there, it does nothing.

    Raises:
        UserError: a folder that cannot be packed, a directory that holds something else or is too small.
        Stopped, StorageError: as `Packing.write`.
    """
    if not re.fullmatch(r"[\w-]+", options.prefix):
        raise UserError(f"--prefix {options.prefix!r}: only letters, digits, - and _ can stand in it")
    started = time.monotonic()
    source, root = open_folder(options.folder, options.exclude)
    if options.to.resolve().is_relative_to(Path(root).resolve()):
        raise UserError(f"--to {str(options.to)!r}: lies in --from, where it would be one more class; take another")
    sizes = _sizes(source, root)
    order = None if options.shuffle is None else FullOrder(options.shuffle, len(source))
    job = Packing(source, sizes, order, _cuts(options, sizes, order), options.prefix, options.to)
    with alone(options.to):
        missing = job.begin(_record(options, source, sizes))
        images = sum(map(job.images, missing))
        with Progress(f"packing {len(missing)} shards", images) as progress:
            with contextlib.closing(each(job.write, missing, options.workers)) as written:
                for number in written:
                    progress.add(job.images(number))
        job.finish()
    seconds = time.monotonic() - started
    if options.json:
        done = {"path": str(job.pattern()), "shards": len(job.shards), "written": len(missing), "images": len(source)}
        done |= {"classes": len(source.class_names), "image_bytes": int(sizes.sum()), "seconds": round(seconds, 3)}
        print(json.dumps(done, indent=2, ensure_ascii=False))
    else:
        print(f"{job.pattern()}: {len(source)} images of {len(source.class_names)} classes in {len(job.shards)} shards")
        print(f"{len(missing)} shards written in {seconds:.1f} s, {images / seconds:.0f} images/s")
    return 0


def _sizes(source: Source, root: str) -> np.ndarray:
    """Bytes of each file, int64 (N,)."""

    def size(index: int) -> int:
        path = os.path.join(root, source.key(index))
        return retried(lambda: os.stat(path).st_size, path)

    found = np.empty(len(source), dtype=np.int64)
    with Progress("listing", len(source), "files") as progress, ThreadPoolExecutor(STAT_THREADS) as pool:
        for first in range(0, len(source), 4096):  # or every index waits in the pool's queue at once
            part = range(first, min(first + 4096, len(source)))
            found[part.start : part.stop] = list(pool.map(size, part))
            progress.add(len(part))
    return found


def _cuts(options: argparse.Namespace, sizes: np.ndarray, order: FullOrder | None) -> np.ndarray:
    if options.shard_bytes is None:
        each_has = options.images_per_shard or IMAGES_PER_SHARD
        return np.append(np.arange(0, len(sizes), each_has), len(sizes))
    positions = np.arange(len(sizes))
    return cut(packed_bytes(sizes if order is None else sizes[order.indices(positions)]), options.shard_bytes)


def _record(options: argparse.Namespace, source: Source, sizes: np.ndarray) -> dict[str, Any]:
    """What decides every byte of the shards."""
    listing = hashlib.blake2b(source.digest().encode(), digest_size=16)
    listing.update(sizes.astype("<i8").tobytes())
    size = {"shard_bytes": options.shard_bytes} if options.shard_bytes else {
        "images_per_shard": options.images_per_shard or IMAGES_PER_SHARD
    }  # fmt: skip
    return {
        "format": FORMAT, "prefix": options.prefix, **size, "shuffle": options.shuffle, "images": len(source),
        "image_bytes": int(sizes.sum()), "classes": len(source.class_names), "listing": listing.hexdigest(),
    }  # fmt: skip


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]*)", text.strip().lower())
    if found is None or found[2] not in UNITS or (size := int(float(found[1]) * UNITS[found[2]])) < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 1GB, 512MiB or 1000000, found {text!r}")
    return size
