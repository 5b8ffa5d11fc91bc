"""The message of a trainer that would run out of memory, before any accelerator time is spent."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace

import torch

from vitds import dist
from vitds.errors import UserError
from vitds.host_memory import available_bytes
from vitds.planning.changes import Place, changes
from vitds.planning.devices import GIB, Device
from vitds.planning.memory import memory
from vitds.planning.workload import Workload

MOST_WAYS = 3


def refuse_what_cannot_fit(workload: Workload, ranks: int, memory_bytes: int, what: str) -> None:
    """Refuses a run whose tensors alone, without margin or workspace and with what the forecast may be wrong by, are more than a
    rank's memory.

    Args:
        memory_bytes: that a rank has.
        what: has them, as a user would say it.

    Raises:
        UserError: with the largest parts, and what would fit.
    """
    needed = memory(_touched(workload), ranks)
    if needed.least <= memory_bytes:
        return
    here = Device(what, workload.device, memory_bytes, 1e15, 1e12)
    parts = sorted((part for part in needed.parts if needed.worst in part.when), key=lambda part: -part.bytes)[:4]
    largest = ", ".join(f"{': '.join(filter(None, (part.kind, part.what)))} {part.bytes / GIB:.1f}" for part in parts)
    found = changes(workload, Place(ranks, here, here.machine()), faster_than=None, most=MOST_WAYS)
    ways = [" ".join(f"--set {shlex.quote(setting)}" for setting in change.settings) for change in found]
    would = (
        "\n    ".join(["what would fit:", *ways])
        if ways
        else "no single change and no pair of changes makes it fit; use more ranks"
    )
    raise UserError(
        f"this run cannot fit: a rank needs {needed.least / GIB:.1f} GiB at least ({largest}), and {what} has "
        f"{memory_bytes / GIB:.1f} GiB\n{would}\n`vitds plan` tells more; --ignore-forecast starts it all the same"
    )


def _touched(workload: Workload) -> Workload:
    """The workload as it fills memory: on a CPU the part of a bucket that no gradient is ever written to takes none."""
    job, size = workload.job, "reduce_bucket_size"
    if workload.device != "cpu" or job.zero.get(size, 5e8) <= job.trained:
        return workload
    return replace(workload, job=job.at_stage(job.stage, **{size: job.trained}))


def room_here() -> tuple[str, int, str]:
    """What this rank may fill: the kind of device, bytes, and whose they are. Its GPU's memory, or a rank's share of what this
    host has left."""
    device = dist.device()
    if device.type == "cuda":
        return "cuda", torch.cuda.get_device_properties(device).total_memory, "the GPU"
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or dist.world_size())
    return "cpu", available_bytes() // local, "this host" if local == 1 else f"each of the {local} ranks of this host"
