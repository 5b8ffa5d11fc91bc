"""Rank, world size, agreement between ranks, and how a rank ends.

Importing this module starts nothing; outside a process group everything behaves as a world of one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as torch_dist

from vitds.errors import EXIT_PREEMPTED, Preempted, Stopped, UserError

Result = TypeVar("Result")
LEAVE_SECONDS = 120.0
"""How long a rank that has done its work waits for the others."""


def rank() -> int:
    """This process's rank, from the process group or, before there is one, from the launcher's environment."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of ranks."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """This process's rank on its own host."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """True on the one rank that speaks and writes for all."""
    return rank() == 0


def device() -> torch.device:
    """This rank's accelerator, or the CPU."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        # A scheduler may show each rank its own GPU only (srun --gpus-per-task=1).
        return torch.device("cuda", local_rank() if torch.cuda.device_count() > 1 else 0)
    return torch.device("cpu")


def barrier() -> None:
    """Wait for all ranks."""
    if torch_dist.is_initialized():
        torch_dist.barrier()


def host_group() -> Any | None:
    """A gloo group over all ranks, for what is said between hosts and must not wait for devices; None in a world of one.

    Collective until it is there: the first call makes one where the default group is of another kind.
    """
    if not torch_dist.is_initialized() or torch_dist.get_world_size() == 1:
        return None
    global _host_group
    default = torch_dist.group.WORLD
    if _host_group[0] is not default:
        own = torch_dist.get_backend() != "gloo"
        _host_group = (default, torch_dist.new_group(backend="gloo") if own else default)
    return _host_group[1]


_host_group: tuple[Any, Any] = (None, None)
"""The default process group, and the `host_group` over the same ranks."""


def broadcast_object(value: Any, source: int = 0) -> Any:
    """`source`'s value on every rank. Sent by pickle between the ranks of one job, never to or from disk.

    Collective; waits for hosts, not for devices, as `all_objects` does.
    """
    group = host_group()
    if group is None:
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=source, group=group)
    return box[0]


def all_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    group = host_group()
    if group is None:
        return [value]
    values: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(values, value, group=group)
    return values


def sum_over_ranks(tensor: torch.Tensor, group: Any = None) -> torch.Tensor:
    """Adds the tensor up over the ranks, in place; float64 accumulates exactly enough for counts and sums."""
    if torch_dist.is_initialized() and torch_dist.get_world_size(group) > 1:
        torch_dist.all_reduce(tensor, group=group)
    return tensor


def any_rank(flags: Sequence[bool]) -> list[bool]:
    """For each flag, whether it is set on any rank: the same answer on all. Collective; waits for hosts, not for devices.

    Every rank gives as many flags.
    """
    group = host_group()
    if group is None:
        return [bool(flag) for flag in flags]
    bits = torch.tensor([int(flag) for flag in flags], dtype=torch.uint8)
    torch_dist.all_reduce(bits, torch_dist.ReduceOp.MAX, group=group)
    return [bool(bit) for bit in bits.tolist()]


def mean(tensor: torch.Tensor) -> float:
    """Mean over the tensor's elements and over the ranks; waits for the device."""
    total = tensor.detach().double().mean()
    return float(sum_over_ranks(total)) / world_size()


def together(action: Callable[[], Result]) -> Result:
    """Run `action` on every rank; what fails on any of them is raised on all. Collective.

    An error that is neither the user's nor the file system's is a fault of ours: its traceback is printed where it arose.

    Raises:
        UserError, Stopped, Preempted: as the first rank that failed raised it, but a UserError before all others.
        Stopped: any other Exception, with its type, its message and, in a world of several, its rank and host; caused
            by it on the rank where it arose.
    """
    result: Any = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    kind = next((known for known in (UserError, Stopped, Preempted) if isinstance(failure, known)), None)
    if failure is not None and kind is None and not isinstance(failure, OSError):
        with contextlib.suppress(OSError):  # standard error may lie on a disk that has gone
            traceback.print_exception(failure)
    own = None
    if failure is not None:
        own = (kind, str(failure) if kind else f"{type(failure).__name__}: {failure}", rank(), socket.gethostname())
    failures = [found for found in all_objects(own) if found is not None]
    if not failures:
        return result  # type: ignore[no-any-return]
    kind, reason, where, host = min(failures, key=lambda found: (found[0] is not UserError, found[2]))
    if kind is None:
        kind, reason = Stopped, f"rank {where} on {host}: {reason}" if world_size() > 1 else reason
    if failure is not None and own is not None and own[:2] == (kind, reason):
        agreed = failure
    else:
        agreed = kind(reason)
        agreed.__cause__ = failure
    if isinstance(agreed, UserError):
        agreed.agreed = True
    raise agreed


def leave(code: int, *, orderly: bool = True) -> NoReturn:
    """End this process with `code`, so that the launcher reports it.

    With gloo process groups alive, interpreter shutdown aborts now and then after all work is done, and the first rank
    to leave makes the launcher signal the others. So: a barrier, an orderly end of the group, flush, and out.

    Args:
        code: exit code (docs/design.md §3.8).
        orderly: False after a failure, when other ranks may never reach the barrier.
    """
    if torch_dist.is_initialized() and orderly:
        faulthandler.dump_traceback_later(LEAVE_SECONDS, exit=True)  # a host may die just now
        barrier()
        torch_dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave_with_user_error(message: str) -> NoReturn:
    """Print one message from one rank and end with exit code 2.

    Rank 0 speaks and is the first to go, whereupon the launcher ends the others. A rank that is still there after a
    while was alone in its trouble, and speaks too.
    """
    if not is_main():
        # The launcher's, once rank 0 is gone, must end us whoever had caught it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5 if torch_dist.is_initialized() else 20)
    where = "" if is_main() else f"rank {rank()} on {socket.gethostname()}: "
    print(f"vitds: {where}{message}", file=sys.stderr, flush=True)
    leave(2, orderly=False)


def leave_after(error: BaseException) -> NoReturn:
    """End this process as the error that reached the top demands (docs/design.md §3.8)."""
    if isinstance(error, UserError):
        leave_with_user_error(str(error))
    if isinstance(error, Preempted):
        if is_main():
            print(f"vitds: {error}; the same command goes on from there", file=sys.stderr, flush=True)
        leave(EXIT_PREEMPTED)
    known = isinstance(error, Stopped)  # on every rank, so that one line from one of them will do
    incident = getattr(error, "incident", None)  # already said, by one rank for all (vitds.cluster.watch.watching)
    if not known and (incident is None or rank() in incident["ranks"]):
        traceback.print_exception(error)
    elif not known:
        pass
    elif is_main():
        print("\n".join([f"vitds: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr, flush=True)
    leave(1, orderly=known)
