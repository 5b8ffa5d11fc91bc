"""Tensors as a file has them, under its own names, read a piece at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vitds.checkpoint.reading import FLOATS, read_one
from vitds.checkpoint.tensorfile import StoredTensor, TensorSpec
from vitds.errors import UserError
from vitds.models.formats import Conversion, Piece


class Source(ABC):
    """Tensors of one or more files."""

    path: Path
    specs: dict[str, TensorSpec]
    """By the file's own names."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What formats are told of them."""
        return {name: spec.shape for name, spec in self.specs.items()}

    @abstractmethod
    def elements(self, name: str, start: int, numel: int) -> torch.Tensor:
        """Elements [start, start + numel) of a tensor, row-major: (numel,) on the CPU, in the stored dtype.

        Raises:
            UserError: the file ends before, or its content is damaged.
        """

    @abstractmethod
    def place(self, name: str) -> Any:
        """Sorts tensors as they lie in the files."""

    def read(self, piece: Piece) -> torch.Tensor:
        """A piece in its shape, fp32 on the CPU.

        Raises:
            UserError: as `elements`, or not of floats.
        """
        spec, rows = self.specs[piece.key], piece.rows
        if spec.dtype not in FLOATS:
            raise UserError(
                f"{self.path}: tensor {piece.key!r} is {spec.dtype} there; weights are float32, bfloat16 or float16"
            )
        row = math.prod(spec.shape[1:])
        if rows is None:
            shape, start = spec.shape, 0
        elif isinstance(rows, int):
            shape, start = spec.shape[1:], rows * row
        else:
            shape, start = (rows[1] - rows[0], *spec.shape[1:]), rows[0] * row
        return self.elements(piece.key, start, math.prod(shape)).float().view(shape)


class SafetensorsSource(Source):
    """Tensors of safetensors files: only the bytes that are asked for are read."""

    def __init__(self, path: Path, stored: Mapping[str, StoredTensor]) -> None:
        self.path, self.stored = path, stored
        self.specs = {name: there.spec for name, there in stored.items()}

    def elements(self, name: str, start: int, numel: int) -> torch.Tensor:
        return read_one(self.stored, name, start, numel, None, self.path)

    def place(self, name: str) -> Any:
        return self.stored[name].path.name, self.stored[name].offset


def parts_of(conversion: Conversion, read: Callable[[Piece], torch.Tensor]) -> Iterator[torch.Tensor]:
    """A tensor of the target, part after part, contiguous: what a writer puts down one by one."""
    for part in conversion.parts:
        value = part.combine([read(piece) for piece in part.pieces])
        assert tuple(value.shape) == part.shape, (part, value.shape)
        yield value.contiguous()
