"""Where the threads of this process stand, and in which collective."""

from __future__ import annotations

import sys
import threading
import traceback
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple

import torch
import torch.distributed as torch_dist

_COMMUNICATION = ("/torch/distributed/", "/deepspeed/comm/", "/vitds/dist.py")
_API = "/torch/distributed/distributed_c10d.py"
_OTHERS = ("/torch/", "/deepspeed/")


class Place(NamedTuple):
    """One frame."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{'/'.join(Path(self.file).parts[-2:])}:{self.line} in {self.function}"


class Standing(NamedTuple):
    """Where a thread is, for a person."""

    place: str
    """The innermost line that is not torch's or DeepSpeed's."""
    collective: str | None
    """What it waits for the other ranks in, with the line that called it; None: it does not."""


def frames_of(frame: FrameType | None) -> list[Place]:
    """A running thread's frames, outermost first."""
    found = []
    while frame is not None:
        found.append(Place(frame.f_code.co_filename, frame.f_lineno or 0, frame.f_code.co_name))
        frame = frame.f_back
    return found[::-1]


def frames_of_error(at: TracebackType | None) -> list[Place]:
    """The frames an exception came through, outermost first."""
    return [Place(frame.f_code.co_filename, line, frame.f_code.co_name) for frame, line in traceback.walk_tb(at)]


def standing(frames: list[Place]) -> Standing:
    """Where frames lead to."""
    inner = [i for i, place in enumerate(frames) if any(part in place.file for part in _COMMUNICATION)]
    own = [place for place in frames if not any(part in place.file for part in _OTHERS)]
    place = str((own or frames)[-1]) if frames else "unknown"
    if not inner:
        return Standing(place, None)
    # torch's public function, all_reduce or barrier, says more than what it is made of.
    named = next((frames[i] for i in reversed(inner) if frames[i].file.endswith(_API)), frames[inner[-1]])
    callers = frames[: frames.index(named)]
    caller = next((p for p in reversed(callers) if not any(part in p.file for part in _OTHERS)), None)
    return Standing(place, f"{named.function} ({caller or named})")


def whereabouts(main: int) -> Standing:
    """Of the thread `main`; its collective may be under way in a thread of autograd's."""
    frames = sys._current_frames()
    found = standing(frames_of(frames.get(main)))
    if found.collective is None:
        for thread, frame in frames.items():
            if thread not in (main, threading.get_ident()) and _is_foreign(thread):
                inner = standing(frames_of(frame))
                if inner.collective is not None:
                    return Standing(found.place, inner.collective)
    return found


def all_stacks(title: str, main: int, error: BaseException | None = None) -> str:
    """The stack of every thread but this, `main`'s first, each with its innermost call last; before them the error's."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = [title]
    if error is not None:
        lines += ["", *"".join(traceback.format_exception(error)).rstrip().splitlines()]
    for thread, frame in sorted(sys._current_frames().items(), key=lambda item: item[0] != main):
        if thread == threading.get_ident():
            continue
        lines += ["", f"thread {names.get(thread, 'not of Python')} ({thread}):"]
        lines += [f"  {place.file}:{place.line} in {place.function}" for place in frames_of(frame)]
    return "\n".join([*lines, ""])


def flight_record() -> str | None:
    """NCCL's own list of the last collectives as JSON, where torch keeps one (TORCH_FR_BUFFER_SIZE); None without NCCL."""
    try:
        if not torch.cuda.is_available() or not torch_dist.is_initialized():
            return None
        dump = getattr(
            torch._C._distributed_c10d, "_dump_nccl_trace_json", None
        )  # private, and in builds with NCCL only
        if dump is None:
            return None
        return bytes(dump(includeCollectives=True, onlyActive=False)).decode(errors="replace")
    except Exception:  # the stacks are worth having without it
        return None


def _is_foreign(thread: int) -> bool:
    """Whether Python did not start it, as autograd's threads."""
    known = threading._active.get(thread)  # type: ignore[attr-defined]
    return known is None or isinstance(known, threading._DummyThread)
