"""`vitds shapes`: which shapes fit a device under which optimizer, and how fast; predicted, and with --measure tried."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vitds.errors import UserError
from vitds.json_files import finite
from vitds.models import Shape, ViTConfig
from vitds.planning.arguments import count, counts
from vitds.planning.devices import DEVICES, Device, device, local_device
from vitds.planning.shapefinder import GRADIENTS, OPTIMIZERS, Fit, Found, Limits, find, grid, ours, paper
from vitds.planning.shapes_figure import draw
from vitds.planning.trials import STEPS, Trial, try_steps
from vitds.planning.workload import Workload, workload_of, workload_of_shape
from vitds.plots import plots
from vitds.progress import Progress

GIB = 2**30
DEPTHS, WIDTHS = (24, 32, 40, 48, 64, 100), (1024, 1280, 1408, 1664, 2048)
MLPS = ("4096", "6144", "8192")
RATE = {"lr": 8e-4, "weight_decay": 0.03}


def add_verb(verbs: Any) -> None:
    """Add `shapes` to the parser's verbs."""
    parser = verbs.add_parser("shapes", help="find the shapes of model that fit a device, under three optimizers")
    parser.add_argument("--depths", type=counts, default=DEPTHS, metavar="N,N,…", help="numbers of blocks")
    parser.add_argument("--widths", type=counts, default=WIDTHS, metavar="N,N,…")
    parser.add_argument(
        "--mlps", type=_mlps, default=MLPS, metavar="N,…", help='widths of the MLP; "4x": times the width'
    )
    heads = parser.add_mutually_exclusive_group()
    heads.add_argument("--heads", type=counts, default=(16,), metavar="N,N,…", help="default: 16, as g and G have")
    heads.add_argument("--head-dim", type=counts, default=(), metavar="N,N,…", help="widths of a head instead")
    parser.add_argument("--patch-size", type=count, default=14, metavar="N")
    parser.add_argument("--image-size", type=count, default=224, metavar="N")
    parser.add_argument("--num-classes", type=count, default=1000, metavar="N")
    parser.add_argument(
        "--device", metavar="NAME", help=f"one of {', '.join(DEVICES)}; default: this machine's GPU, else h200"
    )
    parser.add_argument("--memory", type=_positive, metavar="GIB", help="instead of what the device has")
    parser.add_argument("--setting", choices=("ours", "paper"), default="ours",
                        help="ours: this trainer on one device; paper: fp32 weights, data-parallel only")  # fmt: skip
    parser.add_argument(
        "--gradients", choices=tuple(GRADIENTS), default="fp32", help="alive at once, in the paper's setting"
    )
    parser.add_argument(
        "--micro-batch", type=count, default=8, metavar="N", help="images that have to fit (default: 8)"
    )
    parser.add_argument(
        "--most", type=count, default=128, metavar="N", help="largest micro batch looked for (default: 128)"
    )
    parser.add_argument("--images", type=count, default=256, metavar="N",
                        help="images of the device in an optimizer step, accumulated (default: 256)")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="of the run file, as in vitds.train.compile=true; ours only")  # fmt: skip
    parser.add_argument("--measure", nargs="?", type=count, const=STEPS, default=0, metavar="STEPS",
                        help=f"also make so many real steps ({STEPS}) of each shape that fits, on this machine")  # fmt: skip
    parser.add_argument(
        "--optimizer", choices=tuple(OPTIMIZERS), default="modified Adafactor", help="that is measured with"
    )
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw the paper's Figure 8; needs matplotlib")
    parser.add_argument("--json", action="store_true", help="for programs: everything, in SI units")


def run(options: argparse.Namespace, load: Callable[..., Any]) -> int:
    """Do what `add_verb` has parsed; the exit code.

    Args:
        load: vitds.config.load_run_file, which lives on a higher floor.

    Raises:
        UserError: an unknown device, shapes that cannot be, a key that is none, matplotlib or a place for the figure missing.
    """
    if options.setting == "paper" and (options.measure or options.set):
        raise UserError("--setting paper: nothing of it can be run here; --measure and --set are for the setting ours")
    if options.most < options.micro_batch:
        raise UserError(f"--most: {options.most} is less than --micro-batch {options.micro_batch}")
    if options.figure is not None:
        plots("--figure")
    where = _device(options)
    limits = Limits(where.memory_bytes, options.micro_batch, options.most, options.images)
    needed = ours if options.setting == "ours" else paper(GRADIENTS[options.gradients])
    asked = list(
        grid(options.depths, options.widths, options.mlps, options.heads, options.head_dim, options.patch_size)
    )
    rows = list[Found]()
    with Progress("shapes worked out", len(asked), "shapes") as progress:
        for row, shape in asked:
            rows.append(find(row, _workload(shape, where, options, load), where, limits, needed))
            progress.add()
    trials = _measured(rows, where, options) if options.measure else {}
    said = _heading(where, options)
    if options.figure is not None:
        draw(rows, options.figure, said[0])
    if options.json:
        print(json.dumps(finite({"device": asdict(where), **_asked(options), "shapes": _rows(rows, trials)}), indent=2))
        return 0
    print("\n".join([*said, "", *table(rows, trials), "", *_footnotes(rows, options)]))
    return 0


def run_file(shape: Shape, options: argparse.Namespace, fit: Fit | None = None) -> dict[str, Any]:
    """A run file that trains a shape on noise on one device.

    Args:
        fit: with its optimizer, micro batch and policy; None: any.
    """
    kind, params = OPTIMIZERS[fit.optimizer if fit else "modified Adafactor"]
    micro = fit.micro_batch if fit else options.micro_batch
    train = {"total_steps": 1000, **({"activation_checkpointing": fit.policy} if fit else {})}
    noise = {"source": "synthetic", "image_size": options.image_size, "num_classes": options.num_classes}
    model = {**asdict(shape), "variant": None, "image_size": options.image_size, "num_classes": options.num_classes}
    return {
        "train_batch_size": micro * max(1, -(-options.images // micro)),
        "train_micro_batch_size_per_gpu": micro,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": kind, "params": {**RATE, **params}},
        "vitds": {"model": model, "data": {"train": noise}, "train": train},
    }


def _workload(shape: Shape, where: Device, options: argparse.Namespace, load: Callable[..., Any]) -> Workload:
    if options.setting == "paper":
        given: dict[str, Any] = {"image_size": options.image_size, "num_classes": options.num_classes}
        model = ViTConfig(**asdict(shape), **given)
        section = {"zero_optimization": {"stage": 0}, "data_types": {"grad_accum_dtype": "fp32"}}
        optimizer = {"type": "ModifiedAdafactor", "params": {}}
        return workload_of_shape(model, optimizer, section, micro_batch=options.micro_batch, device=where.kind)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "shape.json"
        path.write_text(json.dumps(run_file(shape, options)))
        try:
            return workload_of(load(str(path), options.set, world_size=1), where.kind)
        except UserError as error:
            raise UserError(str(error).removeprefix(f"{path}: ")) from None


def _device(options: argparse.Namespace) -> Device:
    here = local_device() if options.device is None else None
    found = here or device(options.device or ("cpu" if options.measure else "h200"))
    return found if options.memory is None else replace(found, memory_bytes=int(options.memory * GIB))


def _measured(rows: Sequence[Found], where: Device, options: argparse.Namespace) -> dict[Shape, Trial]:
    fitting = [row for row in rows if row.fits[options.optimizer].micro_batch]
    trials = {}
    with Progress("shapes measured", len(fitting), "shapes") as progress:
        for row in fitting:
            given = run_file(row.shape, options, row.fits[options.optimizer])
            tried = try_steps(given, options.set, options.measure, on_cpu=where.kind == "cpu")
            trials[row.shape] = replace(tried, optimizer=options.optimizer)
            progress.add()
    return trials


def table(rows: Sequence[Found], trials: dict[Shape, Trial]) -> list[str]:
    """A line a shape."""
    head = ["", "width", "depth", "MLP", "heads", "million", "GFLOP"]
    cells = [[*head, *OPTIMIZERS, *(["measured"] if trials else [])]]
    for row in rows:
        shape = row.shape
        numbers = (shape.width, shape.depth, shape.mlp_dim, shape.num_heads)
        line = [row.name, *map(str, numbers), f"{row.parameters / 1e6:,.1f}", f"{row.flops / 1e9:,.1f}"]
        line += [_cell(fit) for fit in row.fits.values()]
        if trials:
            line.append(_tried(trials.get(shape), row))
        cells.append(line)
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def _cell(fit: Fit) -> str:
    if not fit.micro_batch:
        return f"no: {fit.bytes / GIB:.1f} GiB"
    policy = "" if fit.policy == "none" else f" {fit.policy}"
    return f"{fit.micro_batch}{policy}  {_speed(fit.images_per_second)}/s  {fit.bytes / GIB:.1f} GiB"


def _tried(trial: Trial | None, row: Found) -> str:
    if trial is None:
        return "–"
    if trial.failed:
        return trial.failed[:60]
    predicted = row.fits[trial.optimizer].peak_bytes / GIB
    return f"{_speed(trial.images_per_second)}/s  {trial.peak_bytes / GIB:.1f} GiB ({predicted:.1f})"


def _speed(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _heading(where: Device, options: argparse.Namespace) -> list[str]:
    image = f"{options.image_size} px, patches of {options.patch_size}, {options.num_classes:,} classes"
    if options.setting == "paper":
        setting = f"the paper's setting: fp32 weights, data-parallel only, {options.gradients} gradients alive at once"
    else:
        setting = "this trainer on one device, bf16 with fp32 masters"
    return [
        f"{where.memory_bytes / GIB:.1f} GiB ({where.name}), at least {options.micro_batch} images a micro batch; {setting}",
        image,
        "a forecast from arithmetic; speeds are the device's by data sheet"
        + (", not a TPU's" if options.setting == "paper" else ""),
    ]


def _footnotes(rows: Sequence[Found], options: argparse.Namespace) -> list[str]:
    counts = [f"{sum(row.first == name for row in rows)} fit from {name} on" for name in OPTIMIZERS]
    notes = [f"of {len(rows)} shapes {', '.join(counts)}, {sum(row.first is None for row in rows)} not at all"]
    notes.append(
        "a cell: largest micro batch, activation checkpointing if any, images/s, memory needed; no: memory for the least"
    )
    if options.measure:
        notes.append(
            f"measured: {options.measure} steps with {options.optimizer}, after one that allocates; memory: peak of tensors (predicted)"
        )
    return notes


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    words = (
        "setting",
        "gradients",
        "micro_batch",
        "most",
        "images",
        "image_size",
        "num_classes",
        "set",
        "measure",
        "optimizer",
    )
    return {word: getattr(options, word) for word in words}


def _rows(rows: Sequence[Found], trials: dict[Shape, Trial]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        trial = trials.get(row.shape)
        found.append({**asdict(row), "first": row.first, "measured": None if trial is None else asdict(trial)})
    return found


def _mlps(text: str) -> tuple[str, ...]:
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word.endswith("x"):
            _positive(word[:-1])
        else:
            count(word)
    return tuple(dict.fromkeys(words))


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected a number > 0, found {text!r}")
    return value
