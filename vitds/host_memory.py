"""This host's memory: how much it, or the container that we are in, has left, and locking some of it for the device."""

from __future__ import annotations

import contextlib
import sys
import weakref
from pathlib import Path

import torch

from vitds import dist

_V1_UNLIMITED = 2**60
"""Version 1 writes "no limit" as a number near 2**63."""


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that can be taken before the kernel kills somebody; sys.maxsize where nothing tells.

    The least of what the host has left and what each cgroup above this process has left: its limit minus its use. The
    cache of files that are on disk counts as free, for the kernel drops it when memory is wanted.

    Args:
        root: where /proc and /sys are.
    """
    return min([*_of_host(root), *_of_cgroups(root), sys.maxsize])


def page_lock(memory: torch.Tensor, owner: object) -> None:
    """Keeps host memory (contiguous) in place while `owner` lives, for copies to and from CUDA that are faster and let
    work go on meanwhile. Does nothing without CUDA, or where the system refuses.

    How much faster is unmeasured, and so is what locking takes.
    """
    device = dist.device()
    if device.type != "cuda":
        return
    cudart = torch.cuda.cudart()
    if int(cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 0:
        weakref.finalize(owner, cudart.cudaHostUnregister, memory.data_ptr()).atexit = False
    else:
        with contextlib.suppress(RuntimeError):  # CUDA tells of that failure once more, at the next kernel
            torch.ones(1, device=device)


def _of_host(root: Path) -> list[int]:
    for line in _read(root / "proc/meminfo").splitlines():
        words = line.split()
        if words[:1] == ["MemAvailable:"]:
            return [int(words[1]) * 1024]
    return []


def _of_cgroups(root: Path) -> list[int]:
    left = []
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            for base in (mount, mount / "unified"):
                left += _left(base, path, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            left += _left(mount / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    return left


def _left(mount: Path, path: str, limit_name: str, use_name: str, prefix: str) -> list[int]:
    """What each group from `path` up to the mount has left. In a container the mount may be the group itself, and
    `path` the name that it has outside."""
    own = mount / path.lstrip("/")
    left = []
    for group in (own, *own.parents):
        if not group.is_relative_to(mount):
            break
        limit, use = _read(group / limit_name).strip(), _read(group / use_name).strip()
        if limit.isdigit() and use.isdigit() and int(limit) < _V1_UNLIMITED:
            words = [line.split() for line in _read(group / "memory.stat").splitlines()]
            stat = {pair[0]: int(pair[1]) for pair in words if len(pair) == 2}
            cache = sum(stat.get(f"{prefix}{name}_file", 0) for name in ("active", "inactive"))
            left.append(max(0, int(limit) - int(use) + cache))
    return left


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
