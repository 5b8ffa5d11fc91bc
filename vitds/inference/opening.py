"""A model opened for use: on this rank's device, in evaluation, and callable as the training engine is."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist

from vitds import dist
from vitds.checkpoint.exchange.pretrained import open_model, told_by
from vitds.checkpoint.format import EMA, MODEL
from vitds.errors import UserError
from vitds.launched import adopt
from vitds.models import ViTConfig, VitdsImageProcessor, ViTForImageClassification

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def add_opening(parser: argparse.ArgumentParser) -> None:
    """Add --checkpoint, --set, --ema and --dtype."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH",
        help="a run's directory (its newest checkpoint), a checkpoint, or a model in another format",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="what a file of weights does not say of its model, as in num_heads=16 or loss=softmax",
    )  # fmt: skip
    parser.add_argument("--ema", action="store_true", help="the average of the weights kept beside them")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="in which the model computes; fp32 when absent")


@dataclass(frozen=True)
class Session:
    """An opened model. `vitds.evaluation` uses it as it uses the training engine."""

    model: ViTForImageClassification
    processor: VitdsImageProcessor
    path: Path
    step: int | None
    """Of the checkpoint, where it is one."""

    @property
    def config(self) -> ViTConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.pos_embed.device

    @cached_property
    def labels(self) -> list[str]:
        """The classes' names, by number; LABEL_i where nobody has named them."""
        names: dict[Any, str] = self.config.id2label or {}
        return [names[number] for number in range(self.config.num_classes)]

    def train(self, mode: bool = True) -> None:
        """Nothing: the model stays in evaluation, where an engine goes back to training."""

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, *, features_only: bool = False) -> Any:
        """An output whose `logits` are the logits (B, C), or with `features_only` the pooled features (B, D).

        Args:
            images: (B, 3, S, S) on the device in [−1, 1], as loaders give them (`to_model_range`).
        """
        return self.model(self._levelled(images), features_only=features_only)

    @torch.no_grad()
    def scores(self, pixel_values: torch.Tensor) -> np.ndarray:
        """fp32 (B, C), by transformers' own functions and choice: sigmoids of a model of many labels, or of one class, else
        softmax.

        Args:
            pixel_values: (B, 3, S, S) on the device, as the processor makes them.
        """
        from transformers.pipelines.image_classification import sigmoid, softmax

        logits = self.model(pixel_values).logits.float().cpu().numpy()
        independent = self.config.problem_type == "multi_label_classification" or self.config.num_classes == 1
        found: np.ndarray = sigmoid(logits) if independent else softmax(logits)
        return found

    def _levelled(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [−1, 1] in the range that the processor gives the model, which of ours is this very one."""
        scale, shift = (torch.from_numpy(each)[:, None, None].to(images.device) for each in self.processor.levels)
        if (scale == 127.5).all() and (shift == 1).all():
            return images
        return ((images + 1) * 127.5).round_() / scale - shift  # (B, 3, S, S); the pixels come back exactly


@contextmanager
def opened(options: argparse.Namespace) -> Iterator[Session]:
    """The model that `add_opening`'s arguments name. Under torchrun (or mpirun, srun) one of a group of ranks, whose process
    group lasts as long as the block; every rank holds the whole model.

    Raises:
        UserError: nothing there that could be opened; ranks and no word of where they meet. In a world of several one rank says
            it, for all, and the process ends.
    """
    several = False
    try:
        adopt()
        several = dist.world_size() > 1
        if several:
            device = dist.device()
            if device.type == "cuda":
                torch.cuda.set_device(device)
            torch_dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        yield _session(options)
        if several:
            dist.barrier()
            torch_dist.destroy_process_group()
    except UserError as error:
        if several:
            dist.leave_with_user_error(str(error))
        raise


def _session(options: argparse.Namespace) -> Session:
    found = open_model(
        Path(options.checkpoint).expanduser(),
        kind=EMA if options.ema else MODEL,
        told=told_by(options.set),
        device=dist.device(),
        dtype=DTYPES[options.dtype],
    )
    return Session(found.model, found.processor, found.path, found.step)
