"""Embeddings on disk: a directory of safetensors files, of the images' keys beside them, and of a manifest.

    features.safetensors, or features-00001-of-0000N.safetensors     one tensor `features` (rows, D), fp32 or bf16
    keys.parquet or keys.jsonl, or keys-00001-of-0000N.…             key and label of the same rows in the same order
    manifest.json                                                    what made them; every file with rows, bytes and sha256

Rows stand in the order of the images in their source, through all files; images that cannot be used have none. Nothing is
under its true name before all of it is there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from vitds.checkpoint.files import read_json, sha256_of
from vitds.checkpoint.tensorfile import DTYPE_NAMES, bytes_of
from vitds.data.source import Label
from vitds.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADER_BYTES = 256
"""Kept free at the start of a file for its header, which tells how many rows there are and so is written last."""
KEYS = ("parquet", "jsonl")
FORMAT = 1


@dataclass(frozen=True)
class Part:
    """A file of features, and the file of their keys."""

    features: str
    keys: str
    rows: int
    bytes: int
    sha256: str


def keys_format(wanted: str | None) -> str:
    """parquet where pyarrow is, else jsonl; or what is wanted.

    Raises:
        UserError: parquet is wanted and pyarrow is not there.
    """
    there = find_spec("pyarrow") is not None
    if wanted == "parquet" and not there:
        raise UserError(
            "--keys parquet: needs pyarrow, which is not installed (pip install pyarrow); jsonl needs nothing"
        )
    return wanted or ("parquet" if there else "jsonl")


def part_names(count: int, number: int, keys: str) -> tuple[str, str]:
    """Names of the files of part `number`, from 0, of `count`."""
    suffix = "" if count == 1 else f"-{number + 1:05}-of-{count:05}"
    return f"features{suffix}.safetensors", f"keys{suffix}.{keys}"


class PartWriter:
    """One part, written as rows come.

    Args:
        directory: in which the files are made.
        names: of features and keys.
        width: D.
        dtype: in which features are kept.
        multi_label: labels are lists of classes.
    """

    def __init__(
        self, directory: Path, names: tuple[str, str], width: int, dtype: torch.dtype, multi_label: bool
    ) -> None:
        self._directory, self._names, self._width, self._dtype = directory, names, width, dtype
        self._rows = 0
        self._features: BinaryIO = open(directory / names[0], "xb")  # noqa: SIM115 (closed by `close`)
        self._features.write(b" " * HEADER_BYTES)
        path = directory / names[1]
        self._keys: Any = _Parquet(path, multi_label) if path.suffix == ".parquet" else _JsonLines(path)

    def write(self, features: torch.Tensor, keys: Sequence[str], labels: Sequence[Label]) -> None:
        """Rows (b, D), each with its key and label."""
        self._features.write(bytes_of(features.to("cpu", self._dtype).contiguous()))
        self._keys.write(keys, labels)
        self._rows += len(features)

    def close(self) -> Part:
        """Everything is on disk afterwards."""
        self._keys.close()
        size = self._rows * self._width * self._dtype.itemsize
        tensor = {"dtype": DTYPE_NAMES[self._dtype], "shape": [self._rows, self._width], "data_offsets": [0, size]}
        header = json.dumps({"__metadata__": {"format": "pt"}, "features": tensor}, separators=(",", ":")).encode()
        assert len(header) <= HEADER_BYTES - 8, header
        self._features.seek(0)
        self._features.write((HEADER_BYTES - 8).to_bytes(8, "little") + header.ljust(HEADER_BYTES - 8))
        self._features.flush()
        os.fsync(self._features.fileno())
        self._features.close()
        path = self._directory / self._names[0]
        return Part(*self._names, self._rows, path.stat().st_size, sha256_of(path))

    def abandon(self) -> None:
        """Close what will not be finished."""
        with suppress(OSError):
            self._features.close()
        with suppress(OSError):
            self._keys.close()


class _JsonLines:
    def __init__(self, path: Path) -> None:
        self._file = open(path, "x", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115

    def write(self, keys: Sequence[str], labels: Sequence[Label]) -> None:
        for key, label in zip(keys, labels, strict=True):
            self._file.write(json.dumps({"key": key, "label": label}, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class _Parquet:
    def __init__(self, path: Path, multi_label: bool) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        label = pa.list_(pa.int64()) if multi_label else pa.int64()
        self._schema = pa.schema([("key", pa.string()), ("label", label)])
        self._writer = pq.ParquetWriter(path, self._schema)
        self._keys, self._labels = list[str](), list[Label]()

    def write(self, keys: Sequence[str], labels: Sequence[Label]) -> None:
        self._keys += [key.encode(errors="backslashreplace").decode() for key in keys]
        self._labels += labels
        if len(self._keys) >= 65536:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        self._writer.write_table(pa.table({"key": self._keys, "label": self._labels}, schema=self._schema))
        self._keys, self._labels = [], []

    def close(self) -> None:
        self._flush()
        self._writer.close()


@dataclass(frozen=True)
class Embeddings:
    """A directory of embeddings, of which rows are read when they are wanted."""

    path: Path
    manifest: dict[str, Any]
    parts: list[Part]

    @property
    def rows(self) -> int:
        """N."""
        return sum(part.rows for part in self.parts)

    @property
    def width(self) -> int:
        """D."""
        return int(self.manifest["width"])

    def blocks(self, size: int = 16384) -> Iterator[torch.Tensor]:
        """Rows (b, D) in order, as they are kept, `size` of them or fewer at a time (UserError: see `finite`)."""
        for part in self.parts:
            with safe_open(self.path / part.features, framework="pt") as file:
                stored = file.get_slice("features")
                for start in range(0, part.rows, size):
                    yield finite(stored[start : start + size], self.path / part.features, start)

    def keys_and_labels(self) -> tuple[list[str], list[Label]]:
        """Of all rows.

        Raises:
            UserError: a file of them is damaged.
        """
        keys, labels = list[str](), list[Label]()
        for part in self.parts:
            path = self.path / part.keys
            try:
                if path.suffix == ".parquet":
                    import pyarrow.parquet as pq

                    table = pq.read_table(path)
                    rows = [table.column(name).to_pylist() for name in ("key", "label")]
                else:
                    with open(path, encoding="utf-8") as file:
                        read = [json.loads(line) for line in file]
                    rows = [[row[name] for row in read] for name in ("key", "label")]
            except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's ArrowInvalid is a ValueError
                raise UserError(f"{path}: cannot be read: {error}") from None
            if len(rows[0]) != part.rows:
                raise UserError(f"{path}: {len(rows[0])} keys, the manifest says {part.rows}")
            keys += rows[0]
            labels += rows[1]
        return keys, labels


def finite(rows: torch.Tensor, place: Path, first: int) -> torch.Tensor:
    """The rows, if all are numbers: one that is not would be everybody's nearest neighbour.

    Raises:
        UserError: nan or inf; `first` is the place of the first row in its file.
    """
    if not rows.isfinite().all():
        row = first + int((~rows.isfinite().all(dim=1)).nonzero()[0])
        raise UserError(
            f"{place}: row {row} holds nan or inf: the model gave that for an image, or the file is damaged"
        )
    return rows


def manifest_of(about: dict[str, Any], parts: Sequence[Part]) -> dict[str, Any]:
    """What manifest.json holds."""
    return {
        "format": FORMAT,
        **about,
        "images": sum(part.rows for part in parts),
        "files": [asdict(part) for part in parts],
    }


def open_embeddings(path: Path, argument: str) -> Embeddings:
    """A directory that `vitds embed` wrote.

    Raises:
        UserError: none, or not all of it; `argument` named the path.
    """
    if not (path / "manifest.json").is_file():
        raise UserError(f"{argument} {str(path)!r}: no embeddings there; `vitds embed … --output {path}` makes them")
    manifest = read_json(path / "manifest.json")
    try:
        if manifest["format"] != FORMAT:
            raise UserError(f"{path}/manifest.json: format {manifest['format']!r}; this vitds reads {FORMAT}")
        parts = [Part(**given) for given in manifest["files"]]
        width, dtype = int(manifest["width"]), DTYPE_NAMES[DTYPES[manifest["dtype"]]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}/manifest.json: not what `vitds embed` writes: {error}") from None
    for part in parts:
        place = path / part.features
        _check(place, [part.rows, width], dtype, part.bytes)
        if not (path / part.keys).is_file():
            raise UserError(f"{path / part.keys}: missing")
        if part.keys.endswith(".parquet"):
            keys_format("parquet")
    return Embeddings(path, manifest, parts)


def _check(place: Path, shape: list[int], dtype: str, size: int) -> None:
    try:
        if place.stat().st_size != size:
            raise UserError(f"{place}: {place.stat().st_size:,} bytes long, the manifest says {size:,}")
        with safe_open(place, framework="pt") as file:
            stored = file.get_slice("features")
            if list(stored.get_shape()) != shape or stored.get_dtype() != dtype:
                raise UserError(
                    f"{place}: {stored.get_dtype()} {stored.get_shape()}, the manifest says {dtype} {shape}"
                )
    except FileNotFoundError:
        raise UserError(f"{place}: missing") from None
    except SafetensorError as error:
        raise UserError(f"{place}: cannot be read: {error}") from None
