"""Batches in order, made here or ahead of time by worker processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from vitds.data.samples import Batches, Prepared
from vitds.data.section import DataSection
from vitds.data.slots import Slots

Item = tuple[torch.Tensor, Prepared]
"""The memory in which a batch lies, uint8 (layout.nbytes,), and what is told of it."""


class Feed(Iterator[Item]):
    """Batch number 0, 1, 2, … of `numbers`.

    Without workers each has memory of its own. With workers the memory is theirs to fill again as soon as `held` more
    have been taken.

    Args:
        held: batches that the consumer reads at the same time, the newest included.
        page_locked: the memory is to be copied to a device.
    """

    def __init__(
        self, batches: Batches, numbers: Iterable[int], section: DataSection, *, held: int, page_locked: bool
    ) -> None:
        self._workers: Any = None
        if section.num_workers == 0:
            self._items = (_filled(batches, number) for number in numbers)
            return
        # The workers are told to make batch n + W·P when n is taken, W·P being all that they keep ready. From then on
        # until the next one is taken, n + 1 to n + W·P are being made, and n − held + 1 to n are being read.
        slots = Slots(section.num_workers * section.prefetch + held, batches.layout.nbytes)
        self._workers = iter(
            DataLoader(
                _IntoSlots(batches, slots),
                batch_size=None,
                sampler=numbers,
                num_workers=section.num_workers,
                prefetch_factor=section.prefetch,
                collate_fn=_as_it_is,
                worker_init_fn=_obey_only_the_parent,
                multiprocessing_context="fork",  # shares the slots and the source with the workers as they are
                generator=torch.Generator(),  # Else starting workers would draw from the training process's own.
            )
        )
        if page_locked:
            slots.page_lock()
        self._items = ((slots[number], prepared) for number, prepared in enumerate(self._workers))

    def __next__(self) -> Item:
        return next(self._items)

    def close(self) -> None:
        """Ends the workers, by force if need be.

        Letting go of torch's iterator would end them too, but not while the traceback of an error holds on to it.
        """
        if self._workers is not None:
            self._workers._shutdown_workers()


def _filled(batches: Batches, number: int) -> Item:
    memory = torch.empty(batches.layout.nbytes, dtype=torch.uint8)
    return memory, batches.fill(number, memory)


@dataclass(frozen=True)
class _IntoSlots(Dataset[Prepared]):
    """What a worker is asked for by number: it puts the batch into its slot, and hands back what is told of it."""

    batches: Batches
    slots: Slots

    def __getitem__(self, number: int) -> Prepared:
        return self.batches.fill(number, self.slots[number])


def _as_it_is(item: Any) -> Any:
    return item


def _obey_only_the_parent(worker: int) -> None:
    """Makes this worker end on SIGTERM from its rank alone, and deaf to SIGINT and SIGUSR1.

    A job's end is signalled to all its processes at once; a worker that died of it would fail the rank, which still has
    a checkpoint to save.
    """
    parent = os.getppid()
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def wait_for_parent() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait_for_parent, daemon=True).start()
