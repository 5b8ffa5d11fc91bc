"""`vitds plan --config …`: whether a run fits a device, what would make it fit or faster, and how long it takes."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vitds.errors import UserError
from vitds.json_files import finite
from vitds.planning.arguments import count
from vitds.planning.changes import MOST, Change, Place, changes, largest_micro_batch
from vitds.planning.devices import DEVICES, GIB, Device, device, local_device
from vitds.planning.memory import MOMENTS, Memory
from vitds.planning.scaling import Batches, why_not
from vitds.planning.speed import StepTime
from vitds.planning.storage import Storage, storage
from vitds.planning.workload import Workload, workload_of

SHOWN = 8
UNCALIBRATED = "times are from arithmetic, not calibrated on any GPU (docs/planning.md)"


@dataclass(frozen=True)
class Outlook:
    """What is said of one run."""

    workload: Workload
    place: Place
    memory: Memory
    time: StepTime
    fits: bool
    largest: int
    others: list[Change]
    storage: Storage
    steps: int | None


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `vitds plan` itself; `plan scale` has its own."""
    parser.add_argument("--config", help="run file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in train_batch_size=4096")
    parser.add_argument("--gpus", type=count, default=1, metavar="N", help="ranks (default: 1)")
    parser.add_argument("--gpus-per-host", type=count, metavar="N", help="default: the device's, at most --gpus")
    parser.add_argument(
        "--device", metavar="NAME", help=f"one of {', '.join(DEVICES)}; default: this machine's own GPU"
    )
    parser.add_argument("--gpu-memory", type=_positive, metavar="GIB", help="instead of the device's own memory")
    parser.add_argument("--mfu", type=_fraction, metavar="X", help="what one device reaches, instead of the roofline")
    parser.add_argument("--disk-gb-per-s", type=_positive, default=1.0, metavar="X",
                        help="that a rank writes of a checkpoint (default: 1)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="for programs: everything, in SI units")


def run(options: argparse.Namespace, load: Callable[..., Any]) -> int:
    """0: it fits; 1: it does not.

    Args:
        load: vitds.config.load_run_file, which lives on a higher floor.

    Raises:
        UserError: a run file that cannot be loaded, an unknown device, or none given where this machine has no GPU.
    """
    if options.config is None:
        raise UserError("--config: missing; the run file to plan, or `vitds plan scale --config …`")
    where = _device(options)
    run_file = load(options.config, options.set, world_size=options.gpus)
    workload = workload_of(run_file, where.kind)
    hosts = min(options.gpus_per_host or where.gpus_per_host, options.gpus)
    place = Place(options.gpus, where, where.machine(gpus_per_host=hosts), options.mfu)
    reason = why_not(options.gpus, _batches(run_file), place.machine, workload.job)
    if reason:
        raise UserError(f"{options.config}: {reason}")

    def checked(change: Change) -> Change | None:
        """The change as the run file would have it, bucket sizes and all; None where it may not be or does not do."""
        try:
            changed = workload_of(
                load(options.config, [*options.set, *change.settings], world_size=options.gpus), where.kind
            )
        except UserError:
            return None
        needed, needs = place.judge(changed)
        return Change(change.settings, changed, needed, needs) if place.holds(needed) else None

    outlook = look(
        workload, place, checked, storage(workload, options.gpus, options.disk_gb_per_s * 1e9), _steps(run_file)
    )
    if options.json:
        print(json.dumps(finite(_facts(outlook)), indent=2))
    else:
        print("\n".join(_page(options, outlook)))
    return 0 if outlook.fits else 1


def look(
    workload: Workload,
    place: Place,
    checked: Callable[[Change], Change | None],
    stored: Storage,
    steps: int | None = None,
) -> Outlook:
    """All that is to be said of a run in a place."""
    needed, needs = place.judge(workload)
    fits = place.holds(needed)
    found = changes(workload, place, faster_than=needs.images_per_second if fits else None, most=2 * SHOWN)
    others = [change for change in map(checked, found) if change is not None]
    if fits:
        others = [change for change in others if change.time.images_per_second > needs.images_per_second]
    others.sort(key=lambda change: -change.time.images_per_second)
    largest = largest_micro_batch(workload, place)
    return Outlook(workload, place, needed, needs, fits, largest, others[:SHOWN], stored, steps)


def _device(options: argparse.Namespace) -> Device:
    own = local_device() if options.device is None else None
    if options.device is None and own is None and options.gpu_memory is None:
        raise UserError(
            f"--device: this machine has no GPU that is known; say which is meant ({', '.join(DEVICES)}), or --gpu-memory GIB"
        )
    local = min(options.gpus, options.gpus_per_host or options.gpus)
    found = device(options.device, local) if options.device else own or DEVICES["h100"]
    if options.gpu_memory is not None:
        found = replace(found, memory_bytes=int(options.gpu_memory * GIB))
    return found


def _batches(run_file: Any) -> Batches:
    cluster = run_file.vitds.cluster
    return Batches(run_file.global_batch, run_file.micro_batch, cluster.min_gpus or 1, cluster.max_gpus)


def _steps(run_file: Any) -> int | None:
    try:
        return int(run_file.vitds.train.total.to_steps(global_batch=run_file.global_batch))
    except UserError:  # in epochs, of images that are not here
        return None


def _page(options: argparse.Namespace, outlook: Outlook) -> list[str]:
    workload, place, needed, needs = outlook.workload, outlook.place, outlook.memory, outlook.time
    total, has = needed.total, place.device.memory_bytes
    verdict = (
        f"fits: {(has - total) / GIB:.1f} GiB to spare"
        if outlook.fits
        else f"does not fit: {(total - has) / GIB:.1f} GiB too much"
    )
    lines = [
        f"{workload.model.variant or 'a model'}, {workload.job.trained / 1e6:,.1f} million trained parameters, ZeRO-{workload.job.stage}, "
        f"{workload.optimizer}, {'16 bits' if workload.job.half else 'fp32'}, activation checkpointing {workload.policy}, "
        f"{'compiled' if workload.compiled else 'not compiled'}",
        f"{place.ranks} × {place.device.name} ({has / GIB:.1f} GiB), {place.ranks} × {workload.micro_batch} images × "
        f"{workload.accumulation} micro batches = {needs.images} a step",
        "",
        *_table(needed),
        "",
        f"{verdict} ({total / GIB:.1f} of {has / GIB:.1f} GiB); the largest micro batch that fits: "
        + (f"{MOST:,} or more" if outlook.largest == MOST else f"{outlook.largest or 'none'}"),
        "",
        f"{needs.seconds:.3g} s a step, {needs.images_per_second:,.1f} images/s, {needs.mfu:.1%} MFU: "
        + ", ".join(f"{what} {part / needs.seconds:.0%}" for what, part in needs.parts),
    ]
    lines += _length(outlook)
    lines.append(outlook.storage.describe())
    lines += ["", *_changes(outlook), "", UNCALIBRATED]
    return lines


def _table(needed: Memory) -> list[str]:
    found: dict[str, dict[str, int]] = {}
    for part in needed.parts:
        sizes = found.setdefault(": ".join(filter(None, (part.kind, part.what))), {})
        for moment in part.when:
            sizes[moment] = sizes.get(moment, 0) + part.bytes
    found["tensors"] = needed.moments
    for part in needed.outside:
        found[f"{part.kind}: {part.what}"] = {needed.worst: part.bytes}
    found["in all"] = {needed.worst: needed.total}
    shown = {what: sizes for what, sizes in found.items() if max(sizes.values()) >= 0.005 * GIB}
    rows: list[list[str]] = [["GiB of a rank", *MOMENTS]]
    rows += [[what, *(f"{sizes[m] / GIB:.2f}" if m in sizes else "" for m in MOMENTS)] for what, sizes in shown.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return lines


def _length(outlook: Outlook) -> list[str]:
    if outlook.steps is None:
        return ["the run's length is in epochs of images that are not looked at here"]
    seconds = outlook.steps * outlook.time.seconds
    end = (
        time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + seconds))
        if seconds < 3e9
        else "not in this lifetime"
    )
    return [
        f"{outlook.steps:,} steps: {_hours(seconds)} h, {_hours(seconds * outlook.place.ranks)} GPU-hours; started now, it ends {end}"
    ]


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def _changes(outlook: Outlook) -> list[str]:
    if not outlook.others:
        return [
            "nothing that was tried is faster"
            if outlook.fits
            else "no single change and no pair of changes makes it fit; use more GPUs"
        ]
    head = "faster, and fits:" if outlook.fits else "what would make it fit, from the fastest:"
    rows = [head]
    for change in outlook.others:
        spare = (outlook.place.device.memory_bytes - change.memory.total) / GIB
        said = " ".join(f"--set {shlex.quote(setting)}" for setting in change.settings)
        rows.append(f"  {change.time.images_per_second:9,.1f} images/s  {spare:6.1f} GiB to spare  {said}")
    return rows


def _facts(outlook: Outlook) -> dict[str, Any]:
    place, needed, needs = outlook.place, outlook.memory, outlook.time
    return {
        "fits": outlook.fits,
        "device": vars(place.device),
        "gpus": place.ranks,
        "micro_batch": outlook.workload.micro_batch,
        "accumulation": outlook.workload.accumulation,
        "largest_micro_batch": outlook.largest,
        "memory": {"parts": [vars(part) for part in (*needed.parts, *needed.outside)], "moments": needed.moments,
                   "peak": needed.peak, "total": needed.total, "least": needed.least},
        "step": {"seconds": needs.seconds, "parts": dict(needs.parts), "images_per_second": needs.images_per_second, "mfu": needs.mfu},
        "steps": outlook.steps,
        "gpu_hours": outlook.steps * needs.seconds / 3600 * place.ranks if outlook.steps is not None else None,
        "checkpoint": vars(outlook.storage),
        "changes": [{"set": list(c.settings), "total": c.memory.total, "images_per_second": c.time.images_per_second}
                    for c in outlook.others],
        "note": UNCALIBRATED,
    }  # fmt: skip


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"expected a number > 0, found {text!r}")
    return value


def _fraction(text: str) -> float:
    if not 0 < (value := _positive(text)) <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in (0, 1], found {text!r}")
    return value
