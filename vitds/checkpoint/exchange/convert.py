"""`vitds convert`: a model from any format that is read here into any that is written, a tensor at a time."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitds.checkpoint.exchange.forwards import differences, opened, ours, outputs
from vitds.checkpoint.exchange.given import Given, given
from vitds.checkpoint.exchange.pretrained import told_by
from vitds.checkpoint.exchange.targets import DTYPES, FILE_BYTES, TARGETS, Asked, Target, Written
from vitds.checkpoint.exchange.weights import CONFIG
from vitds.checkpoint.files import sync_directory
from vitds.errors import UserError, one_of
from vitds.models.formats import Outline, description

BOUNDS = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 5e-2}
"""Of --verify: the largest difference in parts of the largest value (at least 1) that rounding explains. Measured on a
ViT-L/16: 8e-7, 7e-4 and 6e-3."""


def add_verb(verbs: Any) -> None:
    """Add `convert` to the parser's verbs."""
    convert = verbs.add_parser(
        "convert",
        help="write a model in another format",
        description="Reads a run, a checkpoint, a Hugging Face directory (ours, SigLIP's, timm's), .safetensors or .npz "
        "and writes a new file or directory. docs/formats.md says what each format can hold.",
    )
    add = convert.add_argument
    add("--from", dest="source", type=Path, required=True, metavar="PATH", help="what holds the model")
    add("--to", required=True, metavar="FORMAT",
        help="; ".join(f"{name}: {target.about}" for name, target in TARGETS.items()))  # fmt: skip
    add("--output", type=Path, required=True, metavar="PATH", help="is made; must not be there")
    add("--ema", action="store_true", help="the average of the weights kept beside them")
    add("--dtype", choices=DTYPES, default="fp32", help="in which weights are written")
    add("--classes", type=int, metavar="N", help="another number of classes, which start at zero; 0: no classifier")
    add("--image-size", type=int, metavar="PIXELS", help="another resolution; position embeddings are resampled")
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help="what the weights do not say, as num_heads=16, variant=ViT-G/14, image_size=384 or loss=softmax")  # fmt: skip
    add("--scan", action="store_true", help="to big_vision: blocks stacked along a first axis")
    add("--file-gb", type=float, default=FILE_BYTES / 1e9, metavar="GB", help="largest file of a directory's weights")
    add("--verify", action="store_true", help="run both sides on random images and print how far they are apart")


def run(options: argparse.Namespace) -> int:
    """Convert; the exit code.

    Raises:
        UserError: an unknown format, a missing package, an output that is there, weights that cannot be used, a format
            that cannot hold them, a disk that is full, sides that are too far apart.
    """
    target = _checked(options)
    model = given(
        options.source,
        ema=options.ema,
        told=told_by(options.set),
        classes=options.classes,
        image_size=options.image_size,
    )
    for line in model.changes:
        print(f"changed: {line}")
    asked = Asked(options.dtype, options.scan, int(options.file_gb * 1e9))
    with _staged(options.output) as staged:
        written = target.write(model, staged, asked)
        if options.verify:
            for line in verified(model, staged, options):
                print(line, flush=True)
        size = _bytes(staged)
    _say(options, model, written, size)
    return 0


def _checked(options: argparse.Namespace) -> Target:
    """The target, after everything that can be known to be wrong before any work."""
    if options.to not in TARGETS:
        raise UserError(one_of("--to", options.to, TARGETS))
    target = TARGETS[options.to]
    if target.suffix is not None and options.output.suffix != target.suffix:
        raise UserError(f"--output: {options.output} is to be one file; its name ends in {target.suffix}")
    if target.suffix is None and options.output.suffix in (".safetensors", ".npz", ".onnx"):
        raise UserError(f"--output: {options.output} is to be a directory; --to {options.to} writes {target.about}")
    for path in (options.output, Path(f"{options.output}.data")) if options.to == "onnx" else (options.output,):
        if path.exists() or path.is_symlink():
            raise UserError(f"--output: {path} is there already; name another, or move it away")
    if not options.output.parent.is_dir():
        raise UserError(f"--output: there is no directory {options.output.parent}")
    if options.to == "safetensors" and (options.output.parent / CONFIG).exists():
        raise UserError(
            f"--output: {options.output.parent / CONFIG} describes another model, and would be taken for this file's; name another place"
        )
    missing = [name for name in target.needs if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--to {options.to}: needs {' and '.join(missing)}; pip install 'vitds[onnx]'")
    for name in target.only:
        if getattr(options, name) != target.only[name]:
            raise UserError(f"--{name}: {options.to} is written in {target.only[name]} only")
    if options.scan and options.to != "big_vision":
        raise UserError(f"--scan: is of big_vision's layout; {options.to} has no other")
    if options.classes is not None and options.classes < 0:
        raise UserError(f"--classes: {options.classes} is not possible; at least 0 (no classifier)")
    if not 0 < options.file_gb < math.inf:
        raise UserError(f"--file-gb: {options.file_gb} is not possible; a number above 0")
    return target


@contextlib.contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A place of the output's name in a directory beside it; what was made there takes its place when all is well, and
    nothing is left of it when it is not. The disk's errors are the user's."""
    stage = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    try:
        stage.mkdir()
        try:
            yield stage / output.name
            # Last the one whose name was asked for: weights lie beside a graph before it has its name.
            for made in sorted(stage.iterdir(), key=lambda path: path.name == output.name):
                os.rename(made, output.with_name(made.name))
            sync_directory(output.parent)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{output}: could not be written: {error.strerror or error}") from error


def verified(model: Given, written: Path, options: argparse.Namespace) -> Iterator[str]:
    """Forward passes side by side: what was given, our model of it, and what was written; one is in memory at a time.

    Raises:
        UserError: a difference that rounding does not explain.
    """
    if options.to == "onnx":
        yield "verified: by onnxruntime, below"
        return
    size = model.config.image_size
    told = {name: getattr(model.config, name) for name in ("num_heads", "image_size", "loss")}
    middle = outputs(ours(model.model()), size)
    sides = [("written", written, options.dtype)]
    if not model.changes and not options.ema and model.weights.path.is_dir():
        sides.insert(0, ("given", model.weights.path, "fp32"))
    for which, path, dtype in sides:
        side, said = opened(path, told), []
        for name, difference, largest in differences(middle, outputs(side, size)):
            said.append(f"{name} {difference:.1e} (of {largest:.3g})")
            if not difference <= BOUNDS[dtype] * largest:
                raise UserError(
                    f"--verify: {name} of what is {which}, by {side.by}, differ from ours by {difference:.1e} of {largest:.3g}: more "
                    f"than {dtype} explains; nothing was kept"
                )
        yield f"verified: {which}, by {side.by}, against our model of it, maximum difference: {', '.join(said)}"
        del side
        gc.collect()


def _bytes(path: Path) -> int:
    """Of a directory's files, or of a file and what lies beside it."""
    files = path.iterdir() if path.is_dir() else path.parent.iterdir()
    return sum(file.stat().st_size for file in files)


def _say(options: argparse.Namespace, model: Given, written: Written, size: int) -> None:
    """What was written and what opens it."""
    what = description(Outline.of(model.config))
    count = f"{written.tensors} tensors, " if written.tensors else ""
    print(f"{model.weights.path} ({model.weights.format.name}: {what})")
    print(f"  to {options.output} ({options.to}: {count}{size / 1e6:,.1f} MB, {options.dtype})")
    print(f"open it with: {written.opens.replace('OUTPUT', str(options.output))}")
    for line in written.notes:
        print(f"note: {line}")
