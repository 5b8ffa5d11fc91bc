"""A model as an ONNX graph from pixels to logits, checked with onnxruntime before it is kept.

ONNX: https://onnx.ai/onnx/repo-docs/IR.html. A file of more than 2 GB cannot be a protobuf message: weights then lie
beside the graph, in NAME.onnx.data, which has to stay where the graph is.
"""

from __future__ import annotations

import gc
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitds.checkpoint.exchange.given import Given
from vitds.errors import UserError
from vitds.models import ViTForImageClassification

OPSET = 20
"""The first with GELU's tanh form as one operator."""
EXTERNAL_BYTES = 1_900_000_000
"""Weights of more bytes lie beside the graph: protobuf ends at 2³¹ − 1, graph and names included."""
BOUND = 1e-4
"""Largest difference of an output, in parts of its largest value (at least 1), with which a graph is kept. Measured on
shapes up to ViT-L/16: 3e-6 at most."""
BATCHES = (1, 3)
"""Checked: one image, and not the number the graph was traced with."""


class _Graph(nn.Module):
    """What becomes the graph: logits (B, C) where there is a classifier, and pooled features (B, D)."""

    def __init__(self, model: ViTForImageClassification) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = self.model.forward_head(self.model.forward_features(pixel_values), pre_logits=True)
        return (self.model.head(features), features) if self.model.config.num_classes else (features,)


def export(given: Given, path: Path) -> list[str]:
    """Write `path` (and `path`.data); returns what there is to say of it.

    Inputs: pixel_values (B, 3, S, S) fp32 in [−1, 1], any B. The image processor's JSON is in the graph's metadata.

    Raises:
        UserError: what onnxruntime computes differs from our model by more than BOUND.
    """
    graph = _Graph(given.model()).eval()
    outputs = ["logits", "features"] if given.config.num_classes else ["features"]
    images = [_images(batch, given.config.image_size) for batch in BATCHES]
    with torch.no_grad():
        ours = [[value.numpy() for value in graph(each)] for each in images]
    external = sum(value.nbytes for value in graph.parameters()) > EXTERNAL_BYTES
    _write(graph, path, outputs, external, given)
    del graph  # the runtime has a copy of its own
    gc.collect()
    worst, largest = _difference(path, outputs, images, ours)
    if worst > BOUND:
        raise UserError(
            f"onnx: onnxruntime's outputs differ from the model's by {worst:.1e} of their largest value; up to {BOUND:.0e} "
            "is rounding; nothing was kept"
        )
    beside = f"; its weights lie in {path.name}.data, which goes wherever the graph goes" if external else ""
    return [
        f"ONNX opset {OPSET}, any batch, fp32: pixel_values to {' and '.join(outputs)}{beside}",
        f"onnxruntime against the model, batches of {' and '.join(map(str, BATCHES))}: maximum difference {largest:.1e}",
    ]


def _write(graph: _Graph, path: Path, outputs: list[str], external: bool, given: Given) -> None:
    log = logging.getLogger("torch.onnx")
    level = log.level
    try:
        log.setLevel(logging.ERROR)  # that torchvision's operators are not there
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                graph, (_images(2, given.config.image_size),), dynamo=True, opset_version=OPSET, verbose=False,
                input_names=["pixel_values"], output_names=outputs, dynamic_shapes={"pixel_values": {0: "batch"}},
            )  # fmt: skip
    finally:
        log.setLevel(level)
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    program.model.metadata_props.clear()
    program.model.metadata_props["preprocessor"] = given.processor.to_json_string()
    program.model.producer_name = "vitds"
    program.save(path, external_data=external)


def _difference(
    path: Path, outputs: list[str], images: list[torch.Tensor], ours: list[list[Any]]
) -> tuple[float, float]:
    """onnxruntime against our outputs: the largest difference in parts of the largest value, and as it is."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = largest = 0.0
    for each, expected in zip(images, ours, strict=True):
        for found, value in zip(session.run(outputs, {"pixel_values": each.numpy()}), expected, strict=True):
            difference = float(abs(found - value).max())
            if difference != difference:
                return float("inf"), float("inf")
            largest = max(largest, difference)
            worst = max(worst, difference / max(1.0, float(abs(value).max())))
    return worst, largest


def _images(batch: int, side: int) -> torch.Tensor:
    """Random images (B, 3, S, S) in [−1, 1], the same every time."""
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(batch)) * 2 - 1
