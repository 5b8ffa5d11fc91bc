"""Every way between formats, by forward passes: the largest difference between what is given and what comes out.

    python benchmarks/parity.py [--pools map gap token] [--large] [--json benchmarks/parity.json]

A small model of random weights is written in each format and each of these is converted into each other one by
`vitds convert`'s own parts. Both ends are run on the same random images in fp32 on the CPU: by the stock class where it
can be imported (SiglipVisionModel, SiglipForImageClassification, AutoModelForImageClassification, timm, onnxruntime),
else by our model of what was read. The difference is the largest of tokens, features and logits that both ends have, in
parts of the largest value. --large adds one ViT-L/16 of our initial weights, from ours into each format.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from runner import Column, Row, Table, report

from vitds.checkpoint.exchange.forwards import Opened, Outputs, differences, importable, opened, outputs
from vitds.checkpoint.exchange.given import given
from vitds.checkpoint.exchange.targets import TARGETS, Asked
from vitds.errors import UserError
from vitds.models import ViTConfig, VitdsImageProcessor, ViTForImageClassification, build_config
from vitds.models.config import ModelSection

COLUMNS = (
    Column("difference", "of the largest", ".1e"), Column("absolute", "absolute", ".1e"), Column("compared", "compared"),
    Column("by", "by"), Column("lost", "left out"),
)  # fmt: skip
SMALL = {"width": 24, "depth": 2, "mlp_dim": 40, "num_heads": 3, "patch_size": 7, "image_size": 38}


def scrambled(config: ViTConfig) -> ViTForImageClassification:
    """A model none of whose parameters is 0 or 1."""
    model = ViTForImageClassification(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def large() -> ViTForImageClassification:
    """A ViT-L/16 of initial weights, with a classifier that is not zero."""
    model = ViTForImageClassification(build_config(ModelSection(variant="ViT-L/16", init_head_bias=-10.0))).eval()
    with torch.no_grad():
        model.head.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    return model


def write(source: Path, told: dict[str, object], to: str, directory: Path) -> Path:
    """What `vitds convert` makes of a source."""
    path = directory / f"out{TARGETS[to].suffix or ''}"
    TARGETS[to].write(given(source, told=told), path, Asked(scan=to == "big_vision"))
    return path


def side(path: Path, told: dict[str, object]) -> Opened:
    """Whoever opens a path; an ONNX graph by onnxruntime."""
    if path.suffix != ".onnx":
        return opened(path, told)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]

    def run(images: torch.Tensor) -> Outputs:
        found = session.run(names, {"pixel_values": images.numpy()})
        return dict(zip(names, map(torch.from_numpy, found), strict=True))

    return Opened(f"onnxruntime {onnxruntime.__version__}", run)


def ways(model: ViTForImageClassification, home: Path, hub: bool) -> Iterator[Row]:
    """A row for each pair of formats.

    Args:
        model: is written in our format first.
        home: an empty directory.
        hub: from ours only.
    """
    config = model.config
    told = {"num_heads": config.num_heads, "image_size": config.image_size}
    (home / "vitds").mkdir()
    model.save_pretrained(home / "vitds")
    VitdsImageProcessor(crop_size=config.image_size).save_pretrained(home / "vitds")
    targets = [to for to in TARGETS if to != "onnx" or importable("onnxruntime")]
    sources = {"vitds": home / "vitds"}
    with contextlib.suppress(UserError):  # what cannot hold the model shows as a row of its own
        for to in () if hub else targets:
            if to not in ("vitds", "onnx") and not (to == "siglip" and config.pool == "token"):
                (home / f"from-{to}").mkdir()
                sources[to] = write(home / "vitds", {}, to, home / f"from-{to}")
    for name, source in sources.items():
        facts = {} if name in ("vitds", "siglip", "timm") else told
        left = side(source, told)
        before = outputs(left, config.image_size)
        for to in targets:
            row = Row(f"{config.pool}: {name} → {to}")
            with tempfile.TemporaryDirectory(dir=home) as place:
                try:
                    made = write(source, facts, to, Path(place))
                    right = side(made, told)
                    compared(row, before, outputs(right, config.image_size), f"{left.by} / {right.by}")
                except UserError as error:
                    row.error = str(error)
            yield row


def compared(row: Row, before: Outputs, after: Outputs, by: str) -> None:
    """Fill a row."""
    found = list(differences(before, after))
    row.figures = {
        "difference": max(difference / largest for _, difference, largest in found),
        "absolute": max(difference for _, difference, _ in found),
        "compared": ", ".join(name for name, _, _ in found),
        "by": by,
        "lost": "the classifier" if "logits" in before and "logits" not in after else "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pools", nargs="+", default=["map", "gap", "token"], choices=["map", "gap", "token"])
    parser.add_argument("--large", action="store_true", help="also a ViT-L/16, from ours into each format")
    parser.add_argument("--json", default=None, help="also written here")
    options = parser.parse_args()
    jobs = [
        (scrambled(ViTConfig(**SMALL, pool=pool, num_classes=5, init_head_bias=-2.5)), False) for pool in options.pools
    ]
    if options.large:
        jobs.append((large(), True))
    tables = []
    for model, hub in jobs:
        with tempfile.TemporaryDirectory() as home, contextlib.redirect_stderr(io.StringIO()):
            rows = list(ways(model, Path(home), hub))
        title = f"{model.config.variant or 'small'}, {model.config.pool} pooling: source → target"
        tables.append(Table(title, COLUMNS, rows))
    report(tables, options.json)


if __name__ == "__main__":
    main()
