"""Evaluates a fixed set of logits on this process's ranks; the first one prints what was found as JSON.

counted.py CLASSES IMAGES BATCH [multi]
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist

from vitds import dist
from vitds.data.batch import Batch
from vitds.evaluation.classification import evaluate
from vitds.evaluation.confusion import Confusion, Ranking


def case(classes: int, images: int, multi: bool) -> tuple[np.ndarray, np.ndarray]:
    """fp32 logits (N, C) with many ties, and labels: (N,), or 0/1 (N, C), some images without any."""
    rng = np.random.default_rng(classes * images)
    logits = np.round(rng.normal(size=(images, classes)) * 2) / 2
    if multi:
        return logits.astype(np.float32), (rng.random((images, classes)) < 0.2).astype(np.float32)
    return logits.astype(np.float32), rng.integers(0, classes, images)


class Loader:
    """This rank's batches of the case: image i is one pixel that says its row; the last ones are padded."""

    def __init__(self, labels: np.ndarray, batch: int) -> None:
        self.labels, self.batch = labels, batch

    def __iter__(self) -> Any:
        stride = self.batch * dist.world_size()
        for start in range(0, len(self.labels), stride):
            own = np.arange(self.batch) + start + dist.rank() * self.batch
            rows = np.minimum(own, len(self.labels) - 1)
            images = torch.from_numpy(rows.astype(np.float32))[:, None, None, None]
            yield Batch(
                images, torch.from_numpy(self.labels[rows]), own.tolist(), torch.from_numpy(own < len(self.labels))
            )


class Engine:
    """Gives the rows of the case that the images say."""

    device = torch.device("cpu")

    def __init__(self, logits: np.ndarray) -> None:
        self.logits, self.training = torch.from_numpy(logits), True

    def train(self, mode: bool = True) -> None:
        self.training = mode

    def __call__(self, images: torch.Tensor) -> Any:
        assert not self.training
        return SimpleNamespace(logits=self.logits[images.flatten().long()])


def found(classes: int, images: int, batch: int, multi: bool, tops: tuple[int, ...] = (1, 5)) -> dict[str, Any]:
    logits, labels = case(classes, images, multi)
    confusion, ranking = Confusion(classes, tops), Ranking()
    engine = Engine(logits)
    figures = evaluate(
        engine, Loader(labels, batch), "sigmoid", tops=tops, witnesses=[confusion, ranking] if multi else [confusion]
    )
    assert engine.training
    confusion.share()
    return {
        "figures": figures,
        "images": confusion.images.tolist(),
        "right": confusion.right.tolist(),
        "pairs": np.stack(confusion.pairs).tolist(),
        "map": ranking.mean_average_precision(at_once=2) if multi else None,
    }


if __name__ == "__main__":
    torch_dist.init_process_group("gloo")
    answer = found(*map(int, sys.argv[1:4]), multi=sys.argv[4:] == ["multi"])
    if dist.is_main():
        print("FOUND " + json.dumps(answer))
    dist.leave(0)
