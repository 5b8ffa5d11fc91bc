"""The memory that tensors take while a block runs, counted by their storages: what a GPU's allocator would be asked for."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Seen:
    """Bytes of tensor storages that were allocated while a block ran and are still alive."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0
        self.peaks: dict[str, int] = {}
        """By what was being done (`Seen.part`)."""
        self._alive: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._at_peak: list[tuple[int, str]] = []
        self._part = ""

    def part(self, name: str) -> None:
        """From here on peaks are `name`'s too."""
        self._part = name
        self.peaks[name] = max(self.peaks.get(name, 0), self.now)

    def where(self, least: int = 2**20) -> list[tuple[int, int, str]]:
        """What was alive at the peak: (bytes, storages, line of code that made them), from the largest."""
        sums, counts = Counter[str](), Counter[str]()
        for size, place in self._at_peak:
            sums[place] += size
            counts[place] += 1
        return [(size, counts[place], place) for place, size in sums.most_common() if size >= least]

    def add(self, storage: torch.UntypedStorage, place: str) -> None:
        """A storage that no input of the operation had; it is counted until it is freed."""
        key, size = id(storage), storage.nbytes()
        if not size or key in self._alive:
            return

        def freed(_: Any) -> None:
            self.now -= self._alive.pop(key)[1]

        self._alive[key] = weakref.ref(storage, freed), size, place
        self.now += size
        if self.now > self.peak:
            self.peak = self.now
            self._at_peak = [(size, place) for _, size, place in self._alive.values()]
        if self.now > self.peaks.get(self._part, 0):
            self.peaks[self._part] = self.now


class _Watching(TorchDispatchMode):
    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _counts(t)}
        for tensor in tree_leaves(result):
            if _counts(tensor) and (storage := tensor.untyped_storage())._cdata not in given:
                self.seen.add(storage, _caller())
        return result


def _counts(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type != "meta"


def _caller() -> str:
    """The line outside torch for which an operation runs; a backward pass has none of its own."""
    frame = sys._getframe(2)
    while frame.f_back is not None and (
        "/torch/" in frame.f_code.co_filename or frame.f_code.co_name.startswith("__torch_")
    ):
        frame = frame.f_back
    return f"{'/'.join(frame.f_code.co_filename.split('/')[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"


@contextmanager
def live_memory() -> Iterator[Seen]:
    """While open, counts storages as they are allocated and freed: `seen.now`, `seen.peak`. Not inside compiled code."""
    seen = Seen()
    with _Watching(seen):
        yield seen
