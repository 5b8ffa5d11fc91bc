"""`vitds plan`, of which `plan scale` is here: the forecast of a run file on many GPUs, and the bytes behind it."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vitds.json_files import finite
from vitds.models import ViTForImageClassification, build_config, flops_per_image
from vitds.optim.groups import build_groups
from vitds.planning import plan_verb
from vitds.planning.arguments import count, counts
from vitds.planning.job import Job, Traffic
from vitds.planning.scaling import HYBRID, Batches, Forecast, Machine, forecast, own_label, traffic, variants, why_not

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
STAGES = (1, 2, 3)
# fmt: off
TIMES = ("GPUs", "ZeRO", "micro × acc", "compute s", "sent GB", "comm s", "waited s", "step s", "images/s", "efficiency")
VOLUMES = ("GPUs", "ZeRO", "micro × acc", "what", "when", "collective", "ranks", "calls", "payload GB", "sent GB")
# fmt: on


def add_verb(verbs: Any) -> None:
    """Add `plan` and what may follow it to the parser's verbs."""
    machine = Machine()
    plan = verbs.add_parser("plan", help="work out whether a run fits, what would make it fit, and how long it takes")
    plan_verb.add_options(plan)
    scale = plan.add_subparsers(dest="action", metavar="scale").add_parser(
        "scale", help="forecast step time, images/s and efficiency of a run file on many GPUs, for given links"
    )
    scale.add_argument("--config", required=True, help="run file")
    scale.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in train_batch_size=32768")
    scale.add_argument("--gpus", type=counts, default=GPUS, metavar="N,N,…", help="default: 8,16,…,4096")
    scale.add_argument("--gpus-per-host", type=count, default=machine.gpus_per_host, metavar="N")
    scale.add_argument("--peak-tflops", type=_positive, default=machine.peak_flops / 1e12, metavar="X",
                       help="dense TFLOP/s of one GPU in the training precision (default: 989, an H100 in bf16)")  # fmt: skip
    scale.add_argument("--mfu", type=_fraction, default=machine.mfu, metavar="X",
                       help="part of that which one GPU alone reaches in model FLOPs (default: 0.5)")  # fmt: skip
    scale.add_argument("--intra-gb-per-s", type=_positive, default=machine.intra / 1e9, metavar="X",
                       help="GB/s that a GPU sends inside its host (default: 450, NVLink 4)")  # fmt: skip
    scale.add_argument("--inter-gb-per-s", type=_positive, default=machine.inter / 1e9, metavar="X",
                       help="GB/s that a GPU sends to other hosts (default: 50, one 400 Gbit/s card a GPU)")  # fmt: skip
    scale.add_argument("--latency-us", type=_not_negative, default=machine.latency * 1e6, metavar="X",
                       help="microseconds of a collective's hop between hosts (default: 10)")  # fmt: skip
    scale.add_argument("--intra-latency-us", type=_not_negative, default=machine.intra_latency * 1e6, metavar="X",
                       help="microseconds of a hop inside a host (default: 2)")  # fmt: skip
    scale.add_argument("--overlap", type=_share, default=machine.overlap, metavar="X",
                       help="part of the communication that can hide behind compute (default: 0.9)")  # fmt: skip
    scale.add_argument("--bytes", action="store_true", help="print the bytes by collective instead")
    scale.add_argument("--json", action="store_true", help="for programs: everything, in SI units")


def run(options: argparse.Namespace, load: Callable[..., Any]) -> int:
    """Do what `add_verb` has parsed; the exit code.

    Args:
        load: vitds.config.load_run_file, which lives on a higher floor.

    Raises:
        UserError: a run file that cannot be loaded.
    """
    if options.action is None:
        return plan_verb.run(options, load)
    job, batches, flops = read(options.config, options.set, load)
    machine = Machine(
        options.gpus_per_host, options.peak_tflops * 1e12, options.mfu, options.intra_gb_per_s * 1e9,
        options.inter_gb_per_s * 1e9, options.latency_us * 1e-6, options.intra_latency_us * 1e-6, options.overlap,
    )  # fmt: skip
    stages = sorted({*STAGES, job.stage})
    if options.bytes:
        return _print_bytes(job, batches, machine, options, stages)
    rows = forecast(job, batches, flops, machine, options.gpus, stages)
    if options.json:
        cells = [{**vars(row), "step": row.step} for row in rows]
        print(json.dumps(finite({"machine": vars(machine), "parameters": job.trained, "rows": cells}), indent=2))
        return 0
    print("\n".join([*_heading(job, batches, machine, flops), "", *_table(rows), "", *_footnotes(rows)]))
    return 0


def read(path: str, overrides: Sequence[str], load: Callable[..., Any]) -> tuple[Job, Batches, float]:
    """What the forecast needs of a run file: the job, its batch sizes, and FLOPs of one image's forward pass.

    Raises:
        UserError: as `load`.
    """
    run_file = load(path, overrides, world_size=None)
    part = run_file.vitds
    with torch.device("meta"):
        model = ViTForImageClassification(build_config(part.model))
    patterns = {"decay_patterns": model.decay_patterns(), "overrides": part.groups}
    groups = build_groups(model.shapes, **run_file.rates, **patterns)
    names = tuple(group.names for group in groups if not group.frozen)
    job = Job(
        model.shapes, model.factored_views(), names, run_file.deepspeed, run_file.optimizer,
        part.train.activation_checkpointing,
    )  # fmt: skip
    batches = Batches(run_file.global_batch, run_file.micro_batch, part.cluster.min_gpus or 1, part.cluster.max_gpus)
    return job, batches, flops_per_image(model.config)


def _heading(job: Job, batches: Batches, machine: Machine, flops: float) -> list[str]:
    return [
        f"{job.trained / 1e6:,.1f} million trained parameters, {3 * flops / 1e12:.2f} TFLOP an image and step, "
        f"{batches.total} images a step",
        f"{machine.gpus_per_host} GPUs a host at {machine.mfu:g} of {machine.peak_flops / 1e12:g} TFLOP/s; "
        f"{machine.intra / 1e9:g} GB/s inside a host, {machine.inter / 1e9:g} GB/s a GPU between hosts, "
        f"{machine.latency * 1e6:g} µs a hop between hosts and {machine.intra_latency * 1e6:g} inside; {machine.overlap:g} of the communication can hide",
        "a forecast from arithmetic, not a measurement; docs/scaling.md says what is not in it",
    ]


def _table(rows: Sequence[Forecast]) -> list[str]:
    cells: list[tuple[str, ...]] = [TIMES]
    for row in rows:
        name = row.stage + (" ←" if row.own else "")
        if row.impossible:
            cells.append((str(row.gpus), name, row.impossible))
            continue
        micro = f"{row.micro_batch}{'*' if row.note else ''} × {row.accumulation}"
        efficiency = "–" if math.isnan(row.efficiency) else f"{row.efficiency:.0%}"
        times = (row.compute, row.sent / 1e9, row.communication, row.waited, row.step)
        cells.append(
            (str(row.gpus), name, micro, *(f"{t:.3g}" for t in times), f"{row.images_per_second:,.0f}", efficiency)
        )
    return _aligned(cells)


def _footnotes(rows: Sequence[Forecast]) -> list[str]:
    notes = ["←  the run file's own setting"] if any(row.own for row in rows) else []
    if any(row.note for row in rows):
        notes.append("*  another micro batch than the run file's, which does not divide")
    if any(row.stage == "3 hpZ" for row in rows):
        notes.append("3 hpZ: with zero_hpz_partition_size = GPUs of a host, unless the run file sets another")
    if any(row.stage == HYBRID for row in rows):
        notes.append("hybrid: cut inside each host only; DeepSpeed 0.19.8 does not have it")
    return notes


def _print_bytes(
    job: Job, batches: Batches, machine: Machine, options: argparse.Namespace, stages: Sequence[int]
) -> int:
    found: list[dict[str, Any]] = []
    for gpus in options.gpus:
        for _, label, variant in variants(job, machine, gpus, stages):
            reason = why_not(gpus, batches, machine, variant)
            micro, accumulation = (0, 0) if reason else batches.on(gpus)
            parts = [] if reason else traffic(variant, label, machine, gpus, accumulation)
            row = {"gpus": gpus, "stage": label, "own": label == own_label(job), "impossible": reason}
            row |= {"micro_batch": micro, "accumulation": accumulation}
            found.append(row | {"parts": [{**vars(part), "wire": part.wire} for part in merged(parts)]})
    if options.json:
        print(json.dumps(finite({"parameters": job.trained, "rows": found}), indent=2))
        return 0
    cells: list[tuple[str, ...]] = [VOLUMES]
    for row in found:
        first = (str(row["gpus"]), f"{row['stage']}{' ←' if row['own'] else ''}")
        batch = f"{row['micro_batch']} × {row['accumulation']}"
        if row["impossible"]:
            cells.append((*first, row["impossible"]))
        for part in row["parts"]:
            said = (part["what"], part["when"], part["kind"], str(part["ranks"]), str(part["calls"]))
            cells.append((*first, batch, *said, f"{part['payload'] / 1e9:.4g}", f"{part['wire'] / 1e9:.4g}"))
            first, batch = ("", ""), ""
    print("\n".join(_aligned(cells)))
    return 0


def merged(parts: Sequence[Traffic]) -> list[Traffic]:
    """The same with equal kinds added up, in their order."""
    sums: dict[tuple[str, str, int, str], list[int]] = {}
    for part in parts:
        entry = sums.setdefault((part.what, part.kind, part.ranks, part.when), [0, 0])
        entry[0] += part.payload
        entry[1] += part.calls
    return [Traffic(what, kind, size, calls, ranks, when) for (what, kind, ranks, when), (size, calls) in sums.items()]


def _aligned(cells: Sequence[tuple[str, ...]]) -> list[str]:
    """A row that is shorter than the first ends in a remark, which may be longer than its column."""
    full = [row for row in cells if len(row) == len(cells[0])]
    widths = [max(len(row[i]) for row in full) for i in range(len(cells[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in cells]


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, found {text!r}")
    return value


def _positive(text: str) -> float:
    if (value := _number(text)) <= 0:
        raise argparse.ArgumentTypeError(f"expected a number > 0, found {text!r}")
    return value


def _not_negative(text: str) -> float:
    if (value := _number(text)) < 0:
        raise argparse.ArgumentTypeError(f"expected a number ≥ 0, found {text!r}")
    return value


def _fraction(text: str) -> float:
    if not 0 < (value := _number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in (0, 1], found {text!r}")
    return value


def _share(text: str) -> float:
    if not 0 <= (value := _number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1], found {text!r}")
    return value
