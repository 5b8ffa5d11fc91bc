"""The ridge on rows that are spread over the ranks, and the probe of a small ViT on the digits; rank 0 writes what comes out.

A script for tests.launching.ranks: probed.py DIRECTORY."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.evaluation.test_ridge import made, rows_of
from tests.zero.small import MODEL
from vitds import dist
from vitds.data import DataSection, SourceSection
from vitds.evaluation.fewshot import FewShot
from vitds.evaluation.probe_sets import FewshotSection, ProbeSetSection, open_sets
from vitds.evaluation.ridge import NotFinite, Rows, solve
from vitds.models import ViTForImageClassification, build_config
from vitds.zero import init_distributed

DIGITS = ProbeSetSection(SourceSection("digits", transforms=[]), SourceSection("digits", transforms=[]))


class Plain:
    """A model without DeepSpeed, as evaluation wants an engine; it counts its images."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = ViTForImageClassification(build_config(MODEL)).eval()
        self.images = 0

    def train(self, mode: bool = True) -> None:
        pass

    def __call__(self, images: torch.Tensor, features_only: bool) -> Any:
        self.images += len(images)
        return self.model(images, features_only=features_only)


def mine(rows: Rows) -> Rows:
    """Of all rows those of this rank, as loaders share them; the last rank has fewer."""
    own = torch.arange(len(rows.places)) // 3 % dist.world_size() == dist.rank()
    return Rows(rows.features[own], rows.classes[own], rows.places[own])


def main(directory: Path) -> None:
    init_distributed()
    found: dict[str, Any] = {}
    for name, width, shots in (("dual", 50, [3]), ("primal", 12, [2, 5])):
        features, labels = made(width, 4, [7] * 4)
        rows = mine(rows_of(features, labels, max(shots), 0, 4))
        found[name] = [probe.weights.tolist() for _, probe in solve(rows, shots, 4, 1024.0)][-1]
    rows.features[:1] = float("nan") if dist.is_main() else rows.features[:1]
    try:
        list(solve(rows, [2], 4, 1024.0))
    except NotFinite as error:
        found["refused"] = str(error).split(":")[0]
    section = FewshotSection(sets={"digits": DIGITS}, shots=[1, 5, 10])
    probe = FewShot(
        Plain(), open_sets(section, 8), section.shots, section.l2, DataSection(DIGITS.train),
        batch=17, image_size=8, rank=dist.rank(), world_size=dist.world_size(),
    )  # fmt: skip
    found["figures"] = probe.measure(lambda: None)
    if dist.is_main():
        (directory / f"{dist.world_size()}.json").write_text(json.dumps(found))
    dist.leave(0)


if __name__ == "__main__":
    main(Path(next(word for word in sys.argv[1:] if not word.startswith("--"))))
