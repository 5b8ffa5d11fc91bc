"""The next batch on its way to the device while the model works on this one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import torch

from vitds.data.feed import Feed, Item

DEPTH = 1
"""Batches that lie on the device and wait; one more may be on its way."""
PATIENCE_SECONDS = 5.0
"""How long `close` waits for a thread that waits for a batch itself."""


class Ahead(Iterator[Item]):
    """A feed's items with their memory on the device, copied by a thread of its own on a stream of its own.

    What the feed raises is raised here, and again by each further call.
    """

    def __init__(self, feed: Feed, device: torch.device) -> None:
        self._feed, self._device = feed, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: queue.SimpleQueue[Item | BaseException] = queue.SimpleQueue()
        self._room = threading.Semaphore(DEPTH)
        self._closed = False
        self._end: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="vitds-ahead", daemon=True)
        self._thread.start()

    def __next__(self) -> Item:
        if self._end is None:
            item = self._ready.get()
            self._room.release()
            if not isinstance(item, BaseException):
                if self._stream is not None:  # else its memory could be given to the next batch while it is in use
                    item[0].record_stream(torch.cuda.current_stream(self._device))
                return item
            self._end = item
        if isinstance(self._end, StopIteration):
            raise StopIteration  # anew: the traceback of one that is kept would keep all of this
        raise self._end

    def close(self) -> None:
        """Ends the thread and the feed. A thread that waits for storage which does not answer is left behind."""
        self._closed = True
        self._room.release()
        self._thread.join(PATIENCE_SECONDS)
        self._feed.close()

    def _run(self) -> None:
        try:
            while not self._closed:
                memory, prepared = next(self._feed)
                self._room.acquire()
                self._ready.put((self._copied(memory), prepared))
        except StopIteration:
            self._ready.put(StopIteration())
        except BaseException as error:
            self._ready.put(error)

    def _copied(self, memory: torch.Tensor) -> torch.Tensor:
        """On the device, and there when this returns: the feed may then put another batch where this one was."""
        with torch.cuda.stream(self._stream):
            copy = torch.empty_like(memory, device=self._device)
            copy.copy_(memory, non_blocking=True)
            if self._stream is not None:
                done = torch.cuda.Event(blocking=True)  # sleeps instead of spinning
                done.record(self._stream)
                done.synchronize()
        return copy
