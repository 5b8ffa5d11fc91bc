"""Saving: whole tensors from all ranks into one directory, which exists completely or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vitds import dist
from vitds.checkpoint.files import FileRecord, sync_directory, to_json, write_bytes
from vitds.checkpoint.format import (
    FORMAT_VERSION,
    MODEL,
    MODEL_FILE,
    MODEL_FILE_BYTES,
    OPTIMIZER,
    OPTIMIZER_FILE_BYTES,
    REPLACED,
    TEMPORARY,
    TRAINING_STATE,
    Manifest,
    assign_files,
    check_file_name,
    directory_name,
    index_json,
    index_name,
    write_manifest,
)
from vitds.checkpoint.gather import Gathered, agree_on_tensors, stream
from vitds.checkpoint.tensorfile import TensorFileWriter, file_order
from vitds.errors import Stopped
from vitds.layout import Shard

WRITER = 0


def save_checkpoint(
    directory: Path,
    step: int,
    weights: list[Shard],
    state: list[Shard],
    training_state: dict[str, Any],
    extra_files: Mapping[str, str | bytes],
    *,
    model_file_bytes: int = MODEL_FILE_BYTES,
    optimizer_file_bytes: int = OPTIMIZER_FILE_BYTES,
) -> Path:
    """Write `directory`/step-… and return it once it is durable under that name. Collective over all ranks.

    What is written depends on the tensors' values alone, not on how many ranks hold them. The writer's memory grows
    by a chunk or two (gather.CHUNK_BYTES), whatever the tensors' sizes. A directory of the same step is replaced.

    Args:
        directory: the run's `checkpoints/`, made if it is missing.
        step: updates made.
        weights: this rank's part of the model, fp32, under the model's own names.
        state: this rank's part of the optimizer's state, "<parameter>.<state>".
        training_state: everything else that a resume needs; strict JSON. Read on rank 0.
        extra_files: name -> content (config.json, README.md, …). Read on rank 0.
        model_file_bytes: largest model file; a model up to this size is one `model.safetensors`.
        optimizer_file_bytes: largest optimizer file.

    Raises:
        Stopped: on all ranks alike, with the first reason: the disk is full or read-only, training_state is not
            JSON, an element that no rank or two ranks hold. Nothing is left behind, earlier checkpoints stay.
    """
    model, optimizer = agree_on_tensors(weights, WRITER), agree_on_tensors(state, WRITER)
    for name, tensor in model.items():
        assert tensor.spec.dtype == torch.float32, f"{name}: weights are saved as fp32, not {tensor.spec.dtype}"
        assert name not in optimizer, f"{name} is both a parameter and a state"
    model_files = assign_files(MODEL, [tensor.spec for tensor in model.values()], model_file_bytes)
    optimizer_files = assign_files(OPTIMIZER, [tensor.spec for tensor in optimizer.values()], optimizer_file_bytes)
    final = directory / directory_name(step)
    temporary = final.with_name(final.name + TEMPORARY)
    records: dict[str, FileRecord] = {}

    def begin() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        if temporary.exists():
            shutil.rmtree(temporary)
        _check_room(directory, sum(tensor.spec.nbytes for tensor in (*model.values(), *optimizer.values())))
        temporary.mkdir()
        small = {name: text.encode() if isinstance(text, str) else text for name, text in extra_files.items()}
        small[TRAINING_STATE] = to_json({**training_state, "format_version": FORMAT_VERSION})
        small[index_name(OPTIMIZER)] = index_json(optimizer_files)
        if MODEL_FILE not in model_files:
            small[index_name(MODEL)] = index_json(model_files)
        for name, content in small.items():
            check_file_name(name, "extra_files")
            records[name] = write_bytes(temporary / name, content)

    def write(file: str, tensors: list[Gathered], shards: list[Shard]) -> None:
        record = _write_file(temporary / file, tensors, shards)
        if record is not None:
            records[file] = record

    def commit() -> None:
        write_manifest(temporary, Manifest(step, records))
        sync_directory(temporary)
        _take_name(temporary, final)
        sync_directory(directory)

    try:
        _together(begin, WRITER)
        for file, specs in {**model_files, **optimizer_files}.items():
            gathered, shards = (model, weights) if file in model_files else (optimizer, state)
            _together(partial(write, file, [gathered[spec.name] for spec in file_order(specs)], shards))
        _together(commit, WRITER)
    except Exception as error:
        if dist.rank() == WRITER:
            shutil.rmtree(temporary, ignore_errors=True)
        raise Stopped(f"checkpoint {final} could not be written: {error}; earlier ones are untouched") from error
    return final


def _together(action: Callable[[], None], only: int | None = None) -> None:
    """Run `action` on all ranks, or on one, and raise on all of them what failed on the first that failed."""
    failure: Exception | None = None
    if only is None or dist.rank() == only:
        try:
            action()
        except Exception as error:
            failure = error
    reasons = dist.all_objects(None if failure is None else f"{type(failure).__name__}: {failure}")
    first = next((reason for reason in reasons if reason is not None), None)
    if first is not None:
        raise RuntimeError(first) from failure


def _write_file(path: Path, tensors: list[Gathered], shards: list[Shard]) -> FileRecord | None:
    """One tensor file: all ranks send, the writer writes and returns its record (None elsewhere).

    A writer that has failed goes on receiving to the end of the file: the senders must not wait for ever. It raises
    after that, and the ranks agree on it before the next file.
    """
    failure: Exception | None = None
    file: TensorFileWriter | None = None
    if dist.rank() == WRITER:
        try:
            file = TensorFileWriter(path, [tensor.spec for tensor in tensors])
        except Exception as error:
            failure = error
    for tensor in tensors:
        for chunk in stream(tensor, shards, WRITER):
            if file is not None and failure is None:
                try:
                    file.write(chunk)
                except Exception as error:
                    failure = error
    if failure is not None:
        if file is not None:
            file.abandon()
        raise failure
    return file.close() if file is not None else None


def _check_room(directory: Path, needed: int) -> None:
    """Say before any work that the disk is too small; a file system that does not tell its size is believed."""
    disk = shutil.disk_usage(directory)
    if disk.total > 0 and disk.free < needed:
        raise OSError(f"{needed / 1e9:.1f} GB needed, {disk.free / 1e9:.1f} GB free at {directory}")


def _take_name(temporary: Path, final: Path) -> None:
    """Rename to the true name. A directory that has it already steps aside first, and is put back by
    `retention.remove_leftovers` should we die between the two renames."""
    if not final.exists():
        os.rename(temporary, final)
        return
    old = final.with_name(final.name + REPLACED)
    if old.exists():
        shutil.rmtree(old)
    os.rename(final, old)
    os.rename(temporary, final)
    shutil.rmtree(old, ignore_errors=True)
