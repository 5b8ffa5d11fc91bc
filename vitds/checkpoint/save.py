"""Saving: whole tensors from all ranks into one directory, which exists completely or not at all.

Every rank writes its share of the files. By default `begin` only copies the share into host memory, a thread writes it
while training goes on, and `commit`, at a later step edge, makes it a checkpoint.
"""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitds import dist
from vitds.checkpoint.bandwidth import write_bandwidth
from vitds.checkpoint.directory import clear, make_directory, seal, small_files
from vitds.checkpoint.format import TEMPORARY, directory_name
from vitds.checkpoint.gather import (
    Plan,
    Rows,
    Tensors,
    agree_on_plan,
    bucket_for,
    named,
    rows_of,
    share_of,
    together,
    wire,
)
from vitds.checkpoint.share import HostCopy, Written, on_the_host, reason_of, write_share
from vitds.checkpoint.tensorfile import bytes_of
from vitds.errors import Stopped
from vitds.host_memory import available_bytes
from vitds.layout import Shard


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on disk; the same on every rank."""

    path: Path
    step: int
    bytes: int
    stall_seconds: float
    """What training waited for it: `begin` and `commit` on rank 0. What the caller does besides, such as deleting
    earlier checkpoints, is not in it."""
    write_seconds: float
    """The longest that a rank wrote."""
    background: bool
    note: str | None
    """Why it was not written in the background, though it was to be."""


@dataclass
class _InFlight:
    """A save that has begun."""

    step: int
    final: Path
    temporary: Path
    plan: Plan
    note: str | None = None
    background: bool = False
    written: Written | None = None
    thread: threading.Thread | None = None
    stall_seconds: float = 0.0


class Saver:
    """Writes the checkpoints of one run, one at a time.

    Memory: one bucket while `begin` runs, on the device where that is what ranks send from, else on the host; it is
    given back to torch then. On the host one copy of this rank's share, kept from save to save; where a host has no
    room for it, saves are synchronous and say so.

    Args:
        directory: the run's `checkpoints/`, shared by all ranks; made if it is missing.
        background: write while training goes on; False: `begin` returns when all is written.
        bucket_bytes: what a rank sends and receives at a time, together, at most.
        file_bytes: largest file, unless a single tensor is larger.
        min_file_bytes: files are not split among ranks below this.
    """

    def __init__(
        self,
        directory: Path,
        *,
        background: bool = True,
        bucket_bytes: int = 512 * 2**20,
        file_bytes: int = 5_000_000_000,
        min_file_bytes: int = 256 * 2**20,
    ) -> None:
        self.directory, self.background = directory, background
        self._sizes = (bucket_bytes, file_bytes, min_file_bytes)
        self._plan: tuple[Rows, Plan] | None = None
        self._host: HostCopy | None = None
        self._save: _InFlight | None = None

    @property
    def pending(self) -> bool:
        """A save has begun and is not committed; the same on every rank."""
        return self._save is not None

    @property
    def busy(self) -> bool:
        """This rank is still writing. Local: nobody is asked."""
        return self._save is not None and self._save.thread is not None and self._save.thread.is_alive()

    def plan(self, tensors: Tensors) -> int:
        """Bytes of the largest share that a rank would write of these tensors. Collective.

        Raises:
            Stopped: they cannot be saved, see `begin`.
        """
        return max(self._plan_or_stop(tensors).share_bytes)

    def share_and_speed(self, tensors: Tensors, probe_bytes: int) -> tuple[int, float]:
        """What tells how long a save of these tensors takes: bytes of the largest share, and bytes per second of the
        slowest writer, measured now, with all that would write writing `probe_bytes` or less. Collective.

        Raises:
            Stopped: they cannot be saved, see `begin`; or it cannot be written there.
        """
        shares = self._plan_or_stop(tensors).share_bytes
        writers = {rank for rank, nbytes in enumerate(shares) if nbytes}
        return max(shares), write_bandwidth(self.directory, min(probe_bytes, max(shares)), writers)

    def begin(
        self,
        step: int,
        tensors: dict[str, list[Shard]],
        training_state: dict[str, Any],
        extra_files: Mapping[str, str | bytes],
    ) -> Saved | None:
        """Take the state as it is now; `commit` makes it `directory`/step-…. Collective.

        An earlier save that is still pending is committed first, and returned.

        Args:
            step: updates made. A directory of the same step is replaced.
            tensors: this rank's part of each kind: MODEL and, if kept, EMA, fp32 under the model's own names;
                OPTIMIZER, "<parameter>.<state>".
            training_state: everything else that a resume needs; strict JSON. Read on rank 0.
            extra_files: name -> content (config.json, README.md, …). Read on rank 0.

        Raises:
            Stopped: on all ranks alike, with the first reason: no room on the disk or for a bucket, a directory that
                cannot be made, training_state is not JSON, an element that no rank or two ranks hold; or the earlier
                save failed. Nothing is left behind, earlier checkpoints stay.
        """
        earlier = self.commit() if self.pending else None
        began = time.perf_counter()
        final = self.directory / directory_name(step)
        temporary = final.with_name(final.name + TEMPORARY)
        small: dict[str, bytes] = {}
        bucket: list[torch.Tensor] = []

        def prepare(plan: Plan) -> None:
            content = {name: text.encode() if isinstance(text, str) else text for name, text in extra_files.items()}
            small.update(small_files(plan, training_state, content))
            make_directory(temporary, sum(plan.share_bytes))

        try:
            plan = self._agreed_plan(tensors)
            together(lambda: prepare(plan), (0,))
            note = self._take_memory(plan) if self.background else None
            # Before any data moves: a rank without a bucket would leave the others waiting for its bytes.
            together(lambda: bucket.append(bucket_for(plan)))
        except RuntimeError as error:
            if dist.is_main():
                shutil.rmtree(temporary, ignore_errors=True)
            raise _stopped(final, str(error)) from error
        save, host = _InFlight(step, final, temporary, plan, note), self._host
        pieces = share_of(plan, tensors, bucket.pop())
        if host is not None:
            save.background, cursor = True, 0
            for piece in pieces:
                host.data[cursor : cursor + piece.numel()].copy_(piece)
                cursor += piece.numel()

            def write() -> None:
                save.written = write_share(temporary, small, plan.own_files, [bytes_of(host.data)])

            thread = threading.Thread(target=write, name="checkpoint", daemon=True)
            try:
                thread.start()
                save.thread = thread
            except RuntimeError as error:  # no more threads; `commit` tells all
                save.written = Written(failure=reason_of(error))
        else:
            save.written = write_share(temporary, small, plan.own_files, on_the_host(pieces))
        save.stall_seconds = time.perf_counter() - began
        self._save = save
        return earlier

    def commit(self) -> Saved:
        """Wait for the writers and make the pending save a checkpoint. Collective.

        Raises:
            Stopped: on all ranks alike, with the first reason: a disk that is full or has gone, a file that rank 0
                does not see. Nothing is left behind, earlier checkpoints stay.
        """
        began, save = time.perf_counter(), self._save
        assert save is not None, "no save has begun"
        self._save = None
        if save.thread is not None:
            save.thread.join()
        written = save.written or Written(failure="the writing thread died")
        answers = dist.all_objects(written)
        hosts = save.plan.hosts
        failures = [f"{named(rank, hosts)}{found.failure}" for rank, found in enumerate(answers) if found.failure]
        try:
            if failures:
                raise RuntimeError(failures[0])
            together(lambda: seal(save.temporary, save.final, save.step, hosts, answers), (0,))
        except RuntimeError as error:
            clear(save.temporary, written)
            raise _stopped(save.final, str(error)) from error
        stall = dist.broadcast_object(save.stall_seconds + time.perf_counter() - began)
        return Saved(
            path=save.final,
            step=save.step,
            bytes=sum(record.bytes for found in answers for record in found.records.values()),
            stall_seconds=stall,
            write_seconds=max(found.seconds for found in answers),
            background=save.background,
            note=save.note,
        )

    def _plan_or_stop(self, tensors: Tensors) -> Plan:
        try:
            return self._agreed_plan(tensors)
        except RuntimeError as error:
            raise Stopped(f"the state cannot be saved: {error}") from error

    def _agreed_plan(self, tensors: Tensors) -> Plan:
        """The plan of these tensors, made anew only if some rank's have changed."""
        rows = rows_of(tensors)
        if not all(dist.all_objects(self._plan is not None and self._plan[0] == rows)):
            self._plan = None
            self._plan = rows, agree_on_plan(rows, *self._sizes)
        assert self._plan is not None
        return self._plan[1]

    def _take_memory(self, plan: Plan) -> str | None:
        """Have a buffer of exactly this rank's share, on all ranks; or on none, and say why not."""
        share, bucket = plan.share_bytes[dist.rank()], plan.bucket_bytes if wire().type == "cpu" else 0
        if self._host is not None and self._host.data.numel() != share:
            self._host = None
        needed = bucket if self._host is not None else share + bucket
        available = available_bytes() // plan.hosts.count(socket.gethostname())
        room = available >= needed
        if room and self._host is None:
            try:
                self._host = HostCopy(share)
            except (OSError, RuntimeError):  # a limit on this process, of which the kernel's figures know nothing
                room = False
        answers = dist.all_objects((room, available, needed))
        for rank, (enough, left, wanted) in enumerate(answers):
            if not enough:
                self._host = None
                return (
                    f"written synchronously: {named(rank, plan.hosts) or 'this host: '}{left / 1e9:.2f} GB of host memory to be had, "
                    f"{wanted / 1e9:.2f} GB wanted for a copy of its share and a bucket"
                )
        return None


def _stopped(final: Path, reason: str) -> Stopped:
    return Stopped(f"checkpoint {final} could not be written: {reason}; earlier ones are untouched")
