"""Loading: the newest directory that is whole, and from it only the slices a rank owns. Nothing is unpickled."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from vitds import dist
from vitds.checkpoint.files import read_json, sha256_of
from vitds.checkpoint.format import (
    EMA,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    TRAINING_STATE,
    Manifest,
    NewerFormat,
    check_version,
    index_name,
    read_tensors,
    step_of,
)
from vitds.checkpoint.reading import agree, mismatches, read_one, read_together
from vitds.checkpoint.tensorfile import StoredTensor
from vitds.checkpoint.training_state import check_schedule, check_training_state
from vitds.checkpoint.whole import TENSORS, check_sum, check_whole
from vitds.errors import UserError
from vitds.layout import Shard

Result = TypeVar("Result")


class Checkpoint:
    """A checkpoint directory that has been found whole."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Read everything but the tensors' data; `newest_checkpoint` and `open_checkpoint` call this after checking.

        Raises:
            UserError: an index, a header or training_state.json that cannot be right; file and key are named.
        """
        self.path = path
        self.manifest = manifest
        self.step = manifest.step
        self.training_state: dict[str, Any] = read_json(path / TRAINING_STATE)
        check_version(self.training_state, path / TRAINING_STATE)
        del self.training_state["format_version"]
        check_training_state(self.training_state, self.step, str(path / TRAINING_STATE))
        averaged = f"{EMA}.safetensors" in manifest.files or index_name(EMA) in manifest.files
        kinds = [MODEL, OPTIMIZER, *([EMA] if averaged else [])]
        self.kinds: dict[str, dict[str, StoredTensor]] = {kind: read_tensors(path, kind) for kind in kinds}
        """What is stored, by kind and name; EMA only where there is one."""
        for stored in (stored for tensors in self.kinds.values() for stored in tensors.values()):
            if stored.path.name not in manifest.files:
                raise UserError(f"{stored.path}: not in the manifest")
        _check_same_tensors(self.kinds, path)

    def read_into(self, tensors: dict[str, list[Shard]]) -> None:
        """Fill the live data of the shards, given by kind; each rank reads its own elements only. Collective.

        Strict: of each kind that is asked for, what the ranks ask for and what is stored must be the same tensors, of
        the same shapes and dtypes. Kinds that are not asked for are left alone. Nothing is read before all is known to
        fit.

        Args:
            tensors: kind (MODEL, OPTIMIZER, EMA) -> shards; the same kinds on every rank.

        Raises:
            UserError: on all ranks, naming the tensor, both sides, and the nearest name.
        """
        wanted: list[tuple[StoredTensor, Shard]] = []
        for kind, shards in tensors.items():
            stored = self.kinds.get(kind)
            if stored is None:
                raise UserError(f"{self.path}: holds no {kind}; it has {', '.join(self.kinds)}")
            agree(mismatches({name: there.spec for name, there in stored.items()}, shards, exact=True), self.path)
            asked = {name for names in dist.all_objects([shard.name for shard in shards]) for name in names}
            left = [name for name in stored if name not in asked]
            agree([f"tensor {name!r} is there, and nothing here asks for it" for name in left], self.path)
            wanted += [(stored[shard.name], shard) for shard in shards]
        read_together(wanted, self.path)

    def read_tensor(self, name: str, start: int = 0, numel: int | None = None, kind: str = MODEL) -> torch.Tensor:
        """Elements [start, start + numel) of a tensor, flattened: (numel,) on the CPU in the stored dtype."""
        return read_one(self.kinds[kind], name, start, numel, None, self.path)


def newest_checkpoint(
    directory: Path,
    verify: str = "full",
    report: Callable[[str], None] | None = None,
    passed_over: Callable[[dict[str, Any]], str | None] | None = None,
) -> Checkpoint | None:
    """The newest whole checkpoint of a run that is wanted, or None where there is none. Collective over all ranks.

    Args:
        directory: the run's `checkpoints/`; it need not exist.
        verify: "full" hashes every file; "size" only compares the lengths of those that hold tensors.
        report: told, on rank 0, of every newer directory that was passed over, and why; default: standard error.
        passed_over: given the training_state of a checkpoint, the reason why the run does not want it, or None; asked
            on every rank, before the tensors are hashed.

    Raises:
        UserError: on all ranks: there are checkpoints, and none that can be used (each is named, with its reason): a
            run never begins afresh by itself; or the newest is of a later format version than this program reads.
    """
    say = report or (lambda line: print(f"vitds: {line}", file=sys.stderr, flush=True))
    rejected: list[str] = []
    for name in _agreed_listing(directory):
        checkpoint, reason = _open(directory / name, verify, passed_over)
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
            f"{directory}: {len(rejected)} checkpoint(s) and none can be used; repair them, or move them away to start "
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


def _open(
    path: Path, verify: str, passed_over: Callable[[dict[str, Any]], str | None] | None = None
) -> tuple[Checkpoint | None, str]:
    """The checkpoint, or the first rank's reason why it is none or not wanted; the same answer on every rank."""
    found, reason = agreed(lambda: _wanted(path, passed_over))
    if found is None:
        return None, reason
    manifest, unwanted, seen = found
    if len(set(dist.all_objects(seen))) > 1:
        return None, f"{path / MANIFEST}: ranks see different files; the directory must be shared by all hosts"
    if unwanted is not None:
        return None, unwanted
    if verify == "full":
        # Sums come before content: what a flipped bit makes of a header would be blamed on another file.
        _, reason = agreed(lambda: check_share(path, manifest))
        if reason:
            return None, reason
    return agreed(lambda: _loadable(path, manifest))


def _wanted(path: Path, passed_over: Callable[[dict[str, Any]], str | None] | None) -> tuple[Manifest, str | None, str]:
    """The manifest, why the checkpoint is not wanted, and the manifest's SHA-256."""
    manifest, unwanted = check_whole(path), None
    if passed_over is not None:
        state = read_json(path / TRAINING_STATE)
        check_version(state, path / TRAINING_STATE)
        check_training_state(state, manifest.step, str(path / TRAINING_STATE))
        unwanted = passed_over(state)
    return manifest, unwanted, sha256_of(path / MANIFEST)


def agreed(action: Callable[[], Result]) -> tuple[Result | None, str]:
    """What `action` returns, or None and the first rank's reason, on all ranks; UserError where the format is newer."""
    result, reason, newer = None, None, False
    try:
        result = action()
    except (UserError, OSError) as error:
        reason, newer = str(error), isinstance(error, NewerFormat)
    answers = dist.all_objects((reason, newer, socket.gethostname()))
    reason, newer, host = next((answer for answer in answers if answer[0] is not None), (None, False, ""))
    if reason is None:
        return result, ""
    if newer:
        raise UserError(reason)
    return None, reason if len({answer[2] for answer in answers}) == 1 else f"{reason} (on {host})"


def _loadable(path: Path, manifest: Manifest) -> Checkpoint:
    checkpoint = Checkpoint(path, manifest)
    check_schedule(checkpoint.training_state, str(path / TRAINING_STATE))
    return checkpoint


def _check_same_tensors(kinds: dict[str, dict[str, StoredTensor]], path: Path) -> None:
    """The average is of the very weights."""
    if EMA not in kinds:
        return
    weights, averages = ({name: t.spec for name, t in kinds[kind].items()} for kind in (MODEL, EMA))
    differing = next((n for n in [*weights, *averages] if weights.get(n) != averages.get(n)), None)
    if differing is not None:
        raise UserError(f"{path}: tensor {differing!r} is not the same in {MODEL} and in {EMA}")


def check_share(path: Path, manifest: Manifest, only: Collection[str] | None = None) -> None:
    """Hash this rank's share of the tensors' files.

    Args:
        only: names of the files that matter; default all.
    """
    names = manifest.files if only is None else only
    for name in shared_out({name: manifest.files[name].bytes for name in names if name.endswith(TENSORS)}):
        check_sum(path / name, manifest.files[name])


def shared_out(lengths: Mapping[str, int]) -> list[str]:
    """This rank's share of what has to be read: largest first, each to the rank with the least to do."""
    load, mine = [0] * dist.world_size(), []
    for name, length in sorted(lengths.items(), key=lambda item: (-item[1], item[0])):
        rank = load.index(min(load))
        load[rank] += length
        if rank == dist.rank():
            mine.append(name)
    return mine
