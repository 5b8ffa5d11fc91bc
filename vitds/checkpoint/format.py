"""The checkpoint directory: names, indexes, the manifest, and what makes a directory a checkpoint.

    step-000012000/
      model.safetensors | model-0000i-of-0000N.safetensors + model.safetensors.index.json     fp32 weights
      model.ema.safetensors | model.ema-0000i-… + model.safetensors.index.ema.json            their average, if kept
      optimizer-0000i-of-0000N.safetensors + optimizer.safetensors.index.json                 "<parameter>.<state>"
      training_state.json, config.json, …
      manifest.json       every other file with its bytes and SHA-256; written last

Tensors are whole and carry the model's own names. N is how many files there are, no more: a reader needs to know
nothing of the ranks that wrote them. A directory without a valid manifest does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitds.checkpoint.files import FileRecord, read_json, to_json, write_bytes
from vitds.checkpoint.tensorfile import StoredTensor, TensorSpec, read_header
from vitds.errors import UserError

FORMAT_VERSION = 1
MODEL, OPTIMIZER, EMA = "model", "optimizer", "model.ema"
MANIFEST, TRAINING_STATE = "manifest.json", "training_state.json"
TEMPORARY, REPLACED, DELETED = ".tmp", ".replaced.tmp", ".deleted.tmp"
"""Endings of a directory's name while it is written, while a new one of the same step takes its place, and while it is
deleted."""

_STEP_NAME = re.compile(r"step-(\d{9,18})")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WEIGHT_FILE = re.compile(r".*\.(safetensors|index(\.[^.]*)?\.json|bin|pt|pth|pkl|pickle|ckpt|msgpack|h5)")
"""Files that some loader might take for the weights. One that the manifest does not know has no business here."""


class NewerFormat(UserError):
    """The directory is whole as far as we can tell, and was written by a later version of this program."""


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json: the step, and every other file of the directory."""

    step: int
    files: dict[str, FileRecord]


def directory_name(step: int) -> str:
    """`step-000012000`."""
    return f"step-{step:09d}"


def step_of(name: str) -> int | None:
    """The step in a checkpoint directory's name; None for any other name, `.tmp` ones included."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match and directory_name(int(match[1])) == name else None


def index_name(kind: str) -> str:
    """`model.safetensors.index.json`; of a variant `model.safetensors.index.ema.json`."""
    stem, _, variant = kind.partition(".")
    return f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json"


def file_names(kind: str, count: int) -> list[str]:
    """The names of a kind's `count` files: weights in one file have neither number nor index."""
    if kind != OPTIMIZER and count == 1:
        return [f"{kind}.safetensors"]
    return [f"{kind}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def index_json(files: Mapping[str, Sequence[TensorSpec]]) -> bytes:
    """The index in Hugging Face's layout: total size in bytes, and the file of each tensor."""
    return to_json(
        {
            "metadata": {"total_size": sum(spec.nbytes for specs in files.values() for spec in specs)},
            "weight_map": {spec.name: file for file, specs in files.items() for spec in specs},
        }
    )


def read_tensors(directory: Path, kind: str) -> dict[str, StoredTensor]:
    """The tensors of `kind` in a directory in Hugging Face's layout, ours or anyone's; headers checked, no data read.

    Raises:
        UserError: no such file, an index that is malformed or names a file outside the directory or a tensor that is
            not in the file it names, a bad header.
    """
    single, index = directory / f"{kind}.safetensors", directory / index_name(kind)
    if single.exists():
        return read_header(single)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: no weight_map")
    headers: dict[str, dict[str, StoredTensor]] = {}
    tensors: dict[str, StoredTensor] = {}
    for name, file in weight_map.items():
        check_file_name(file, f"{index}: weight_map.{name}")
        if not file.endswith(".safetensors"):
            raise UserError(f"{index}: tensor {name!r} lies in {file!r}; only .safetensors files are read")
        if file not in headers:
            headers[file] = read_header(directory / file)
        if name not in headers[file]:
            raise UserError(f"{index}: tensor {name!r} is not in {file}, where the index has it")
        tensors[name] = headers[file][name]
    return tensors


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """manifest.json, after every other file has been synced."""
    files = {name: asdict(record) for name, record in sorted(manifest.files.items())}
    content = {"format_version": FORMAT_VERSION, "step": manifest.step, "files": files}
    write_bytes(directory / MANIFEST, to_json(content))


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint directory.

    Raises:
        NewerFormat: a format version this program does not know.
        UserError: missing, or not a manifest of ours.
    """
    path = directory / MANIFEST
    content = read_json(path)
    check_version(content, path)
    step, files = content.get("step"), content.get("files")
    if type(step) is not int or step < 0 or not isinstance(files, dict):
        raise UserError(f"{path}: not a vitds manifest: it needs step and files")
    records: dict[str, FileRecord] = {}
    for name, given in files.items():
        check_file_name(name, f"{path}: files")
        if not isinstance(given, dict) or type(given.get("bytes")) is not int or given["bytes"] < 0:
            raise UserError(f"{path}: files.{name}.bytes is not a length")
        if not isinstance(given.get("sha256"), str) or not _SHA256.fullmatch(given["sha256"]):
            raise UserError(f"{path}: files.{name}.sha256 is not a SHA-256")
        records[name] = FileRecord(given["bytes"], given["sha256"])
    return Manifest(step, records)


def check_version(content: dict[str, Any], path: Path) -> None:
    """Refuse JSON of a format version that we do not know (UserError; NewerFormat for a later one)."""
    version = content.get("format_version")
    if type(version) is not int or version < 1:
        raise UserError(f"{path}: no format_version: not a file of vitds")
    if version > FORMAT_VERSION:
        raise NewerFormat(
            f"{path}: format_version {version} is newer than this vitds reads ({FORMAT_VERSION}); update vitds"
        )


def check_file_name(name: Any, where: str) -> None:
    """A plain file name, in this directory and no other (UserError)."""
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name) or ".." in name:
        raise UserError(f"{where}: {name!r} is not the name of a file in this directory")


def check_directory(directory: Path) -> Manifest:
    """Everything about a checkpoint directory that can be told from its manifest and its files' lengths.

    Raises:
        NewerFormat: see `read_manifest`.
        UserError: a bad manifest, a step other than the directory's name says, a file that is missing or of another
            length, a weight file the manifest does not list. Each names the file.
    """
    manifest = read_manifest(directory)
    if step_of(directory.name) not in (None, manifest.step):
        raise UserError(f"{directory / MANIFEST}: of step {manifest.step}, in a directory named {directory.name}")
    for name in (TRAINING_STATE, index_name(OPTIMIZER)):
        if name not in manifest.files:
            raise UserError(f"{directory / MANIFEST}: does not list {name}")
    for name, record in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path}: missing")
        if (size := path.stat().st_size) != record.bytes:
            raise UserError(f"{path}: {size:,} bytes long, the manifest says {record.bytes:,}")
    for path in sorted(directory.iterdir()):
        if _WEIGHT_FILE.fullmatch(path.name) and path.name not in manifest.files:
            raise UserError(f"{path}: not in the manifest: a foreign file; move it out of the checkpoint")
    return manifest
