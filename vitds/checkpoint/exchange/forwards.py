"""Forward passes of what a path holds, by whoever opens it: the stock class where there is one, else ours."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vitds.checkpoint.exchange.pretrained import open_model
from vitds.checkpoint.files import read_json
from vitds.models import ViTForImageClassification

Outputs = dict[str, torch.Tensor]
"""By name, those of: tokens (B, N, D) normalised, features (B, D) pooled, logits (B, C)."""


class Opened(NamedTuple):
    """Who opened a path, and what it computes of images (B, 3, S, S) in [−1, 1]."""

    by: str
    run: Callable[[torch.Tensor], Outputs]


def ours(model: ViTForImageClassification) -> Opened:
    """Our model."""
    return _by_timms_names("vitds", model, model.config.num_classes)


def _by_timms_names(by: str, model: Any, num_classes: int) -> Opened:
    """A model with timm's methods, as ours has them."""

    def run(images: torch.Tensor) -> Outputs:
        tokens = model.forward_features(images)
        features = model.forward_head(tokens, pre_logits=True)
        found = {"tokens": tokens, "features": features}
        return {**found, "logits": model.head(features)} if num_classes else found

    return Opened(by, run)


def opened(path: Path, told: Mapping[str, Any]) -> Opened:
    """What is at `path`, with everybody else's code if it can be imported, in fp32 on the CPU.

    Args:
        told: ViTConfig's words for what the weights do not say.

    Raises:
        UserError: see `open_model`.
    """
    saved = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if saved.get("model_type") in ("siglip", "siglip_vision_model"):
        return _siglip(path, saved)
    if saved.get("model_type") == "vitds":
        return _transformers(path)
    if "architecture" in saved and importable("timm"):
        return _timm(path)
    return ours(open_model(path, told=told).model)


def importable(name: str) -> bool:
    """Whether a package is here and its import does not fail."""
    if importlib.util.find_spec(name) is None:
        return False
    with contextlib.suppress(Exception):  # timm without a torchvision that fits raises RuntimeError
        importlib.import_module(name)
        return True
    return False


def _siglip(path: Path, saved: Mapping[str, Any]) -> Opened:
    import transformers

    if "SiglipForImageClassification" in (saved.get("architectures") or ()):
        classifier: Any = transformers.SiglipForImageClassification.from_pretrained(path, dtype=torch.float32).eval()
        return Opened("SiglipForImageClassification", lambda images: {"logits": classifier(images).logits})
    tower: Any = transformers.SiglipVisionModel.from_pretrained(path, dtype=torch.float32).eval()

    def run(images: torch.Tensor) -> Outputs:
        found = tower(images)
        pooled = found.last_hidden_state.mean(1) if found.pooler_output is None else found.pooler_output
        return {"tokens": found.last_hidden_state, "features": pooled}

    return Opened("SiglipVisionModel", run)


def _transformers(path: Path) -> Opened:
    import transformers

    kind = transformers.AutoModelForImageClassification
    return ours(kind.from_pretrained(path, dtype=torch.float32).eval())._replace(by=kind.__name__)


def _timm(path: Path) -> Opened:
    import timm

    model = timm.create_model(f"local-dir:{path.resolve()}", pretrained=True).float().eval()
    return _by_timms_names(f"timm {timm.__version__}", model, model.num_classes)


@torch.no_grad()
def outputs(side: Opened, image_size: int, batch: int = 2) -> Outputs:
    """What a side computes of the same random images each time."""
    generator = torch.Generator().manual_seed(0)
    return side.run(torch.rand(batch, 3, image_size, image_size, generator=generator) * 2 - 1)


def differences(left: Outputs, right: Outputs) -> Iterator[tuple[str, float, float]]:
    """Of each output that both have: its name, the largest difference, and the largest value (at least 1)."""
    for name in ("tokens", "features", "logits"):
        if name in left and name in right:
            difference = (left[name] - right[name]).abs().max()
            yield name, float(difference), max(1.0, float(left[name].abs().max()))
