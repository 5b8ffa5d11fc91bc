"""Loading: the newest directory that is whole, and from it only the slices a rank owns. Nothing is unpickled."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from vitds import dist
from vitds.checkpoint.files import read_json, sha256_of
from vitds.checkpoint.format import (
    MANIFEST,
    MODEL,
    MODEL_FILE,
    OPTIMIZER,
    TRAINING_STATE,
    Manifest,
    NewerFormat,
    check_directory,
    check_version,
    index_name,
    read_tensors,
    step_of,
)
from vitds.checkpoint.tensorfile import StoredTensor, TensorSpec, read_elements, read_header
from vitds.errors import UserError, nearest
from vitds.layout import Shard

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Checkpoint:
    """A checkpoint directory that has been found whole."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Read everything but the tensors' data; `newest_checkpoint` and `open_checkpoint` call this after checking.

        Raises:
            UserError: an index, a header or training_state.json that cannot be right; the file is named.
        """
        self.path = path
        self.step = manifest.step
        self.training_state: dict[str, Any] = read_json(path / TRAINING_STATE)
        check_version(self.training_state, path / TRAINING_STATE)
        del self.training_state["format_version"]
        self._kinds = {kind: read_tensors(path, kind) for kind in (MODEL, OPTIMIZER)}
        self._stored = {**self._kinds[MODEL], **self._kinds[OPTIMIZER]}
        for stored in self._stored.values():
            if stored.path.name not in manifest.files:
                raise UserError(f"{stored.path}: not in the manifest")

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Name, shape and dtype of every tensor, weights and state."""
        return {name: stored.spec for name, stored in self._stored.items()}

    def read_into(self, shards: list[Shard]) -> None:
        """Fill the shards' live data; each rank reads its own elements only. Collective.

        Strict: of each kind (weights, optimizer state) that is asked for at all, what the ranks ask for and what is
        stored must be the same tensors, of the same shapes and dtypes. Nothing is read before all is known to fit.

        Raises:
            UserError: on all ranks, naming the tensor, both sides, and the nearest name.
        """
        _agree(_mismatches(self._stored, shards, exact=True), self.path)
        asked = {name for names in dist.all_objects([shard.name for shard in shards]) for name in names}
        problems = []
        for stored in self._kinds.values():
            left = [name for name in stored if name not in asked]
            if len(left) < len(stored):
                problems += [f"tensor {name!r} is there, and nothing here asks for it" for name in left]
        _agree(problems, self.path)
        _read_together(self._stored, shards, self.path)

    def read_tensor(self, name: str, start: int = 0, numel: int | None = None) -> torch.Tensor:
        """Elements [start, start + numel) of a tensor, flattened: (numel,) on the CPU in the stored dtype."""
        return _read_one(self._stored, name, start, numel, None, self.path)


class WeightsFile:
    """Weights to start from: a checkpoint directory, a Hugging Face directory, or one .safetensors file.

    Stored as fp32, bf16 or fp16; read as fp32.
    """

    def __init__(self, path: Path) -> None:
        """Read headers only.

        Raises:
            UserError: nothing there that holds weights, only pickles, or files that cannot be right.
        """
        self.path = path
        if path.is_file():
            self._stored = read_header(path) if path.suffix == ".safetensors" else _no_weights(path)
        elif (path / MANIFEST).exists():
            check_directory(path)
            self._stored = read_tensors(path, MODEL)
        elif (path / MODEL_FILE).exists() or (path / index_name(MODEL)).exists():
            self._stored = read_tensors(path, MODEL)
        else:
            _no_weights(path)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Name, shape and stored dtype of every tensor."""
        return {name: stored.spec for name, stored in self._stored.items()}

    def read_into(self, shards: list[Shard]) -> None:
        """Fill the shards' live data, cast to fp32; tensors that no shard asks for are left alone. Collective.

        Raises:
            UserError: on all ranks: a tensor missing, of another shape, or not of floats; with the nearest name.
        """
        _agree(_mismatches(self._stored, shards, exact=False), self.path)
        _read_together(self._stored, shards, self.path)

    def read_tensor(self, name: str, start: int = 0, numel: int | None = None) -> torch.Tensor:
        """Elements [start, start + numel) of a tensor, flattened: (numel,) fp32 on the CPU."""
        return _read_one(self._stored, name, start, numel, torch.float32, self.path)


def newest_checkpoint(
    directory: Path, verify: str = "full", report: Callable[[str], None] | None = None
) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None where there is none at all. Collective over all ranks.

    Args:
        directory: the run's `checkpoints/`; it need not exist.
        verify: "full" hashes every file, each on one rank; "size" compares lengths.
        report: told, on rank 0, of every newer directory that was passed over, and why; default: standard error.

    Raises:
        UserError: on all ranks: there are checkpoints, and none of them is whole (each is named, with its reason);
            or the newest is of a later format version than this program reads.
    """
    say = report or (lambda line: print(f"vitds: {line}", file=sys.stderr, flush=True))
    rejected: list[str] = []
    for name in _agreed_listing(directory):
        checkpoint, reason = _open(directory / name, verify)
        if checkpoint is not None:
            if dist.is_main():
                for line in rejected:
                    say(f"checkpoint not used: {line}")
                if rejected:
                    say(f"going back to {checkpoint.path}")
            return checkpoint
        rejected.append(f"{name}: {reason}")
    if rejected:
        listing = "\n  ".join(rejected)
        raise UserError(
            f"{directory}: {len(rejected)} checkpoint(s) and none is whole; repair them, or move them away to start "
            f"afresh:\n  {listing}"
        )
    return None


def open_checkpoint(path: Path, verify: str = "full") -> Checkpoint:
    """One checkpoint directory by its path. Collective over all ranks; UserError on all of them if it is not whole."""
    checkpoint, reason = _open(path, verify)
    if checkpoint is None:
        raise UserError(f"{path}: not a whole checkpoint: {reason}")
    return checkpoint


def _agreed_listing(directory: Path) -> list[str]:
    """Names of checkpoint directories, newest first, as rank 0 sees them."""
    names, problem = [], None
    if dist.is_main():
        try:
            names = [path.name for path in directory.iterdir() if step_of(path.name) is not None]
        except FileNotFoundError:
            pass
        except OSError as error:
            problem = f"{directory}: cannot be read: {error.strerror}"
    names, problem = dist.broadcast_object((names, problem))
    if problem:
        raise UserError(problem)
    return sorted(names, key=lambda name: step_of(name) or 0, reverse=True)


def _open(path: Path, verify: str) -> tuple[Checkpoint | None, str]:
    """The checkpoint, or the first rank's reason why it is none; the same answer on every rank."""
    checkpoint, reason, newer, seen = None, None, False, ""
    try:
        manifest = check_directory(path)
        checkpoint = Checkpoint(path, manifest)
        seen = hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
        if verify == "full":
            _check_share(path, manifest)
    except (UserError, OSError) as error:
        reason, newer = str(error), isinstance(error, NewerFormat)
    answers = dist.all_objects((reason, newer, seen, socket.gethostname()))
    reason, newer, _, host = next((answer for answer in answers if answer[0] is not None), (None, False, "", ""))
    if newer:
        raise UserError(reason)
    if reason is not None:
        return None, reason if len({answer[3] for answer in answers}) == 1 else f"{reason} (on {host})"
    if len({answer[2] for answer in answers}) > 1:
        return None, f"{path / MANIFEST}: ranks see different files; the directory must be shared by all hosts"
    return checkpoint, ""


def _check_share(path: Path, manifest: Manifest) -> None:
    """Hash this rank's share of the files: largest first, each to the rank with the least to do."""
    load = [0] * dist.world_size()
    for name, record in sorted(manifest.files.items(), key=lambda item: (-item[1].bytes, item[0])):
        rank = load.index(min(load))
        load[rank] += record.bytes
        if rank == dist.rank() and sha256_of(path / name) != record.sha256:
            raise UserError(f"{path / name}: its content is not what was saved (SHA-256 differs from the manifest)")


def _no_weights(path: Path) -> dict[str, StoredTensor]:
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    steps = sorted(path.glob("checkpoints/step-*[0-9]")) or sorted(path.glob("step-*[0-9]"))
    if steps:
        raise UserError(f"{path}: holds checkpoints, not weights; name one of them, as {steps[-1]}")
    found = [path] if path.is_file() else sorted(path.iterdir())
    pickles = [file.name for file in found if file.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    if pickles:
        raise UserError(
            f"{path}: {pickles[0]} is a pickle, which may run code and is not loaded; save it as safetensors"
        )
    raise UserError(f"{path}: no weights: expected {MODEL_FILE}, {index_name(MODEL)}, or a .safetensors file")


def _mismatches(stored: dict[str, StoredTensor], shards: list[Shard], *, exact: bool) -> list[str]:
    problems = []
    for shard in shards:
        there = stored.get(shard.name)
        if there is None:
            problems.append(f"no tensor {shard.name!r} there{nearest(shard.name, stored)}")
        elif there.spec.shape != tuple(shard.shape):
            problems.append(f"tensor {shard.name!r} has shape {there.spec.shape} there and {tuple(shard.shape)} here")
        elif exact and there.spec.dtype != shard.data.dtype:
            problems.append(f"tensor {shard.name!r} is {there.spec.dtype} there and {shard.data.dtype} here")
        elif not exact and there.spec.dtype not in FLOATS:
            problems.append(
                f"tensor {shard.name!r} is {there.spec.dtype} there; weights are float32, bfloat16 or float16"
            )
    return problems


def _refuse(problems: list[str], path: Path) -> None:
    if problems:
        more = f"; and {len(problems) - 3} more like these" if len(problems) > 3 else ""
        raise UserError(f"{path}: {'; '.join(problems[:3])}{more}")


def _agree(problems: list[str], path: Path) -> None:
    """Refuse on all ranks what the first rank with a problem refuses."""
    _refuse(next((found for found in dist.all_objects(problems) if found), []), path)


def _read_together(stored: dict[str, StoredTensor], shards: list[Shard], path: Path) -> None:
    problems = []
    try:
        _read(stored, shards)
    except (UserError, OSError) as error:
        problems.append(str(error))
    _agree(problems, path)


def _read(stored: dict[str, StoredTensor], shards: list[Shard]) -> None:
    """Fill the shards in the order in which the files are laid out, one file open at a time."""
    wanted = sorted(shards, key=lambda shard: (stored[shard.name].path, stored[shard.name].offset, shard.start))
    file: BinaryIO | None = None
    with contextlib.ExitStack() as stack:
        opened: Path | None = None
        for shard in wanted:
            there = stored[shard.name]
            if shard.data.numel() == 0:
                continue
            if file is None or opened != there.path:
                stack.close()
                file, opened = stack.enter_context(open(there.path, "rb", buffering=0)), there.path
            read_elements(file, there, shard.start, shard.data)


def _read_one(
    stored: dict[str, StoredTensor], name: str, start: int, numel: int | None, dtype: torch.dtype | None, path: Path
) -> torch.Tensor:
    if name not in stored:
        raise UserError(f"{path}: no tensor {name!r} there{nearest(name, stored)}")
    spec = stored[name].spec
    numel = spec.numel - start if numel is None else numel
    data = torch.empty(numel, dtype=dtype or spec.dtype)
    shard = Shard(name, spec.shape, data, start)
    if dtype is not None:
        _refuse(_mismatches(stored, [shard], exact=False), path)
    _read(stored, [shard])
    return data
