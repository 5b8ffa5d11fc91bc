"""A trace of chosen steps, for TensorBoard and Perfetto, and where their time went (vitds.metrics.attribution)."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from vitds import dist
from vitds.errors import UserError
from vitds.json_files import Expendable
from vitds.metrics.attribution import OPTIMIZER, STEP, attribute

STEPS = 3


@dataclass(frozen=True)
class Window:
    """Which steps are profiled, and on which ranks."""

    first: int = 1
    """Number of the first step, as the log counts: the first update of a run is step 1."""
    count: int = 0
    """How many steps; 0 profiles nothing."""
    ranks: tuple[int, ...] | None = (0,)
    """None: all."""

    @property
    def last(self) -> int:
        """Number of the last step."""
        return self.first + self.count - 1

    @classmethod
    def parse(cls, text: str) -> Window:
        """FIRST, FIRST:COUNT or FIRST:COUNT:RANKS, as on the command line; RANKS is "all" or numbers with commas.

        Raises:
            argparse.ArgumentTypeError: anything else; the parser puts the option's name before it.
        """
        words = text.split(":")
        ranks: tuple[int, ...] | None = (0,)
        try:
            if len(words) > 3:
                raise ValueError
            first, count = _whole(words[0], 1), _whole(words[1], 1) if len(words) > 1 else STEPS
            if len(words) == 3:
                ranks = None if words[2] == "all" else tuple(sorted({_whole(word, 0) for word in words[2].split(",")}))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected FIRST:COUNT or FIRST:COUNT:RANKS, whole numbers from 1 and ranks as in 0,8 or all, found {text!r}"
            ) from None
        return cls(first, count, ranks)

    def check_ranks(self, world_size: int) -> None:
        """Refuse ranks that are not in this world.

        Raises:
            UserError: names the first of them.
        """
        for rank in self.ranks or ():
            if rank >= world_size:
                raise UserError(f"--profile: there is no rank {rank}; allowed: 0 to {world_size - 1}, or all")


def _whole(word: str, least: int) -> int:
    if not word.isascii() or not word.isdigit() or len(word) > 15 or int(word) < least:
        raise ValueError(word)
    return int(word)


class StepProfile:
    """Profiles the steps that were asked for, in this start of a run; does nothing where there are none.

    The step before them is profiled too and thrown away (the profiler's own start costs time), where this start has one.
    Nothing that is computed changes. `<output-dir>/profile` gets `rankR.FIRST.pt.trace.json.gz`, in the name of which
    TensorBoard's profiler finds the rank and the step, and the table as `rankR.FIRST.txt`.

    Args:
        asked: the option.
        run_directory: of the run.
        device: of this rank.
        say: prints a line, on rank 0.
        done: updates made before this start.
        total: updates of the whole run.
    """

    def __init__(
        self,
        asked: Window,
        run_directory: str | os.PathLike[str],
        device: torch.device,
        say: Callable[[str], None],
        done: int,
        total: int,
    ) -> None:
        self._device, self._say = device, say
        self._profiler: torch_profile | None = None
        self._left, self._warming = 0, False
        self._window: Window | None = None
        if not asked.count:
            return
        first, last = max(asked.first, done + 1), min(asked.last, total)
        if last < first:
            say(
                f"--profile: steps {asked.first} to {asked.last} are not in this start of the run, "
                + (f"which makes steps {done + 1} to {total}" if done < total else "which has none left")
                + "; nothing is profiled"
            )
            return
        if (first, last) != (asked.first, asked.last):
            say(f"--profile: of steps {asked.first} to {asked.last} this start makes {first} to {last}")
        if asked.ranks is None or dist.rank() in asked.ranks:
            self._window = Window(first, last - first + 1)
        self._first = first
        self._path = Path(run_directory) / "profile" / f"rank{dist.rank()}.{first:09}.pt.trace.json.gz"
        self._writing = Expendable(self._path)

    @contextmanager
    def step(self, done: int) -> Iterator[None]:
        """Around one optimizer step.

        Args:
            done: updates made before it.
        """
        if self._profiler is None and self._window is not None and done + 2 >= self._window.first:
            self._begin(warm_up=done + 1 < self._window.first)
        if self._profiler is None:
            yield
            return
        last = self._left == 1
        try:
            with record_function(f"{STEP} {done + 1}"):
                yield
                if last and self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)  # the last step ends when its kernels do
        except BaseException:  # stopped in the middle of a step
            self._end()
            raise
        if self._warming:
            self._warming = False
            self._profiler.start_trace()
            return
        self._left -= 1
        if last:
            with self._writing:
                self._save(self._end())

    def optimizer(self) -> AbstractContextManager[object]:
        """Around the update; a range of that name in the trace."""
        return nullcontext() if self._profiler is None else record_function(OPTIMIZER)

    def _begin(self, warm_up: bool) -> None:
        assert self._window is not None
        self._left, self._warming = self._window.count, warm_up
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize(self._device)  # kernels of earlier steps stay out
        self._profiler = torch_profile(activities=activities)
        self._profiler.prepare_trace()
        if not warm_up:
            self._profiler.start_trace()

    def _end(self) -> torch_profile:
        """Profile no more in this start."""
        profiler, self._profiler, self._window = self._profiler, None, None
        assert profiler is not None
        if self._warming:
            profiler.start_trace()  # the only way out of the warm-up
        profiler.stop_trace()
        return profiler

    def _save(self, profiler: torch_profile) -> None:
        """Write trace and table, and say the table on rank 0; OSError where there is no room for them."""
        self._path.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._path.parent, prefix="unfinished-") as place:
            plain, packed = Path(place) / "trace.json", Path(place) / "trace.json.gz"
            profiler.export_chrome_trace(str(plain))
            text = plain.read_bytes()
            with gzip.open(packed, "wb", compresslevel=5) as file:
                file.write(text)
            os.replace(packed, self._path)
        found = attribute(json.loads(text)["traceEvents"])
        assert found is not None, "a trace without our steps"
        said = (
            f"profile of rank {dist.rank()} from step {self._first} on: {found.table()}\n"
            f"trace        {self._path}\n             https://ui.perfetto.dev opens it, and TensorBoard with torch_tb_profiler"
        )
        self._path.with_name(self._path.name.replace(".pt.trace.json.gz", ".txt")).write_text(said + "\n")
        self._say(said)
