"""Where worker processes put the batches that they have made."""

from __future__ import annotations

import mmap

import torch

from vitds.errors import UserError
from vitds.host_memory import available_bytes, page_lock


class Slots:
    """Memory that worker processes, forked later, share with this one: batch `number` lies at `slots[number]`.

    The memory belongs to no file: how large /dev/shm is, which in containers is often 64 MiB, does not matter.

    Args:
        count: batches that are in use at the same time; the next one lies where the oldest of them did.
        nbytes: of a batch.

    Raises:
        UserError: more than this host has left.
    """

    def __init__(self, count: int, nbytes: int) -> None:
        pitch = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        total, left = count * pitch, available_bytes()
        if total > left:
            raise UserError(
                f"vitds.data.num_workers: {count} batches of {nbytes / 2**20:.1f} MiB, which the workers keep ready, are "
                f"{total / 2**30:.2f} GiB, and this host has {left / 2**30:.2f} GiB left; "
                "lower num_workers, prefetch or the micro batch"
            )
        self._memory = torch.frombuffer(mmap.mmap(-1, total), dtype=torch.uint8)
        self._slots = self._memory.view(count, pitch)[:, :nbytes]

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, number: int) -> torch.Tensor:
        """uint8 (nbytes,)."""
        return self._slots[number % len(self._slots)]

    def page_lock(self) -> None:
        """Makes copies to the device faster, and such that work goes on meanwhile. After the fork: what a driver does
        to locked memory might keep it from children."""
        page_lock(self._memory, owner=self)
