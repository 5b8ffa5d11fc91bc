"""safetensors files, written and read a piece at a time.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian length of the header; the header, JSON
padded with spaces; the tensors' bytes, row-major and little-endian, without gaps. The stock writer wants all tensors
of a file in memory at once and the stock reader maps the file; here both sides touch a bounded piece, so that a
10 GB file costs neither its writer nor a rank that needs a slice of it 10 GB.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from vitds.checkpoint.files import JSON_BYTES, DurableFile, FileRecord, parse_json
from vitds.errors import UserError, one_of

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' name of each dtype we write and read."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
READ_AT_ONCE = 16 * 2**20
"""Bytes staged when a piece must change device or dtype on its way in."""


@dataclass(frozen=True)
class TensorSpec:
    """A logical tensor: name, shape, dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its bytes lie at [offset, offset + spec.nbytes)."""

    spec: TensorSpec
    path: Path
    offset: int


def file_order(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The order of tensors within a file: wide dtypes first, so that each tensor is aligned to its dtype; then name."""
    return sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.name))


class TensorFileWriter:
    """One safetensors file: the header at once, then the tensors' bytes in the order of `specs`, as they come."""

    def __init__(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for spec in specs:
            begin, end = end, end + spec.nbytes
            header[spec.name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._left = end
        self._file = DurableFile(path)
        try:
            self._file.write(len(text).to_bytes(8, "little") + text)
        except OSError:
            self._file.abandon()
            raise

    def write(self, data: memoryview) -> None:
        """The next bytes of tensor data; pieces need not end where tensors do. Raises OSError as the disk does."""
        self._left -= data.nbytes
        self._file.write(data)

    def close(self) -> FileRecord:
        """Sync and close."""
        assert self._left == 0, f"{self._left} bytes of tensor data were announced and did not come"
        return self._file.close()

    def abandon(self) -> None:
        """Close a file that will not be finished."""
        self._file.abandon()


def bytes_of(data: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable, as bytes."""
    return data.detach().view(-1).view(torch.uint8).numpy().data


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file; everything about the header is checked, no data is read.

    Raises:
        UserError: missing, truncated, a header that is absurd or not strict JSON, an unknown dtype, bytes that
            overlap, leave gaps, or do not fit the shape or the file.
    """
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, JSON_BYTES):
                raise UserError(f"{path}: not a safetensors file: a header of {length:,} bytes in a file of {size:,}")
            header = parse_json(file.read(length), f"{path}: header")
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    header.pop("__metadata__", None)
    tensors: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, given in header.items():
        spec, begin = _checked(name, given, f"{path}: tensor {name!r}")
        tensors[name] = StoredTensor(spec, path, 8 + length + begin)
        spans.append((begin, begin + spec.nbytes, name))
    cursor = 0
    for begin, end, name in sorted(spans):
        if begin != cursor:
            raise UserError(f"{path}: tensor {name!r} begins at byte {begin} of the data, {cursor} was expected")
        cursor = end
    if 8 + length + cursor != size:
        raise UserError(f"{path}: {size:,} bytes long, its header promises {8 + length + cursor:,}")
    return tensors


def _checked(name: str, given: Any, where: str) -> tuple[TensorSpec, int]:
    """A header's entry as a spec and its first byte within the data."""
    if not isinstance(given, dict) or set(given) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where}: expected dtype, shape and data_offsets, found {str(given)[:200]}")
    if not isinstance(given["dtype"], str) or given["dtype"] not in DTYPES:
        raise UserError(one_of(f"{where}: dtype", given["dtype"], DTYPES))
    shape, offsets = given["shape"], given["data_offsets"]
    if not _counts(shape) or len(shape) > 16 or not _counts(offsets) or len(offsets) != 2:
        raise UserError(f"{where}: impossible shape {str(shape)[:100]} or data_offsets {str(offsets)[:100]}")
    spec = TensorSpec(name, tuple(shape), DTYPES[given["dtype"]])
    if offsets[1] - offsets[0] != spec.nbytes:
        raise UserError(f"{where}: shape {spec.shape} of {given['dtype']} needs {spec.nbytes} bytes, not {offsets}")
    return spec, offsets[0]


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def read_elements(file: BinaryIO, stored: StoredTensor, start: int, into: torch.Tensor) -> None:
    """Elements [start, start + into.numel()) of a stored tensor into `into` (1-D, any device, cast to its dtype).

    Args:
        file: `stored.path`, open unbuffered.

    Raises:
        UserError: the file has become shorter.
    """
    assert 0 <= start <= stored.spec.numel - into.numel(), (stored.spec, start, into.numel())
    assert into.dim() == 1, stored.spec
    assert into.is_contiguous(), stored.spec
    into, itemsize = into.detach(), stored.spec.dtype.itemsize
    file.seek(stored.offset + start * itemsize)
    if into.device.type == "cpu" and into.dtype == stored.spec.dtype:
        _fill(file, bytes_of(into), stored)
        return
    staging = torch.empty(min(into.numel(), READ_AT_ONCE // itemsize), dtype=stored.spec.dtype)
    for begin in range(0, into.numel(), max(1, staging.numel())):
        piece = into[begin : begin + staging.numel()]
        staged = staging[: piece.numel()]
        _fill(file, bytes_of(staged), stored)
        piece.copy_(staged)


def _fill(file: BinaryIO, view: memoryview, stored: StoredTensor) -> None:
    while len(view):
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise UserError(f"{stored.path}: ends within tensor {stored.spec.name!r}")
        view = view[count:]
