"""A plugin (`vitds.plugins`) that ends processes of its own job at an exact instant; the code under test stays as it is.

The environment variable VITDS_ASSASSIN holds an `Order` as JSON; without it, nothing happens.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VARIABLE = "VITDS_ASSASSIN"


@dataclass(frozen=True)
class Order:
    """Which call, on which rank, ends whom.

    The `count`-th call of `call` ("module:name" or "module:class.name"; where `within` is given, calls count only if
    their first argument's text holds it) on rank `rank` fires, before the call or after it, once in the life of
    `scratch`: a directory of the order's own, in which the ranks also leave their process ids.
    """

    call: str
    count: int
    victim: str
    scratch: str
    rank: int = 0
    within: str = ""
    after: bool = False

    def to_environment(self) -> dict[str, str]:
        """What the job must be started with."""
        return {VARIABLE: json.dumps(asdict(self))}

    @property
    def fired(self) -> bool:
        """Whether it has been carried out."""
        return (Path(self.scratch) / "fired").exists()

    def hold_until_released(self) -> None:
        """For the victim "none, held": this rank waits here, alive, until somebody makes the file `released`."""
        while not (Path(self.scratch) / "released").exists():
            threading.Event().wait(0.05)


SIGNALS = {
    "SIGTERM to the ranks": signal.SIGTERM,
    "SIGUSR1 to the ranks": signal.SIGUSR1,
    "SIGTERM to deepspeed": signal.SIGTERM,
}
VICTIMS = ("rank 0", "rank 1", "launch.py", "deepspeed", "everything", *SIGNALS, "none, held")


def parent_of(pid: int) -> int:
    """The parent's process id."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def strike(victim: str, ranks: list[int]) -> None:
    """Send the victim its signal, SIGKILL unless its name says another.

    Args:
        victim: one of VICTIMS.
        ranks: process ids of the ranks, by rank.
    """
    launch = parent_of(ranks[0])
    runner = parent_of(launch)
    targets = {
        "rank 0": [ranks[0]], "rank 1": [ranks[1]], "launch.py": [launch], "deepspeed": [runner],
        "everything": [runner, launch, *ranks], "the ranks": ranks,
    }[victim.rpartition(" to ")[2]]  # fmt: skip
    for pid in sorted(targets, key=lambda pid: pid == os.getpid()):  # itself last
        os.kill(pid, SIGNALS.get(victim, signal.SIGKILL))


def _carry_out(order: Order) -> None:
    scratch = Path(order.scratch)
    try:
        os.close(os.open(scratch / "fired", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    if order.victim == "none, held":
        order.hold_until_released()
        return
    strike(order.victim, [int((scratch / f"rank{r}").read_text()) for r in range(int(os.environ["WORLD_SIZE"]))])


def _watched(call: Callable[..., Any], order: Order) -> Callable[..., Any]:
    calls = 0

    @functools.wraps(call)
    def watched(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += not order.within or order.within in str(arguments[0])
        due = calls == order.count
        if due and not order.after:
            _carry_out(order)
        result = call(*arguments, **named)
        if due and order.after:
            _carry_out(order)
        return result

    return watched


def _take_position(order: Order) -> None:
    rank = int(os.environ["RANK"])
    (Path(order.scratch) / f"rank{rank}").write_text(str(os.getpid()))
    if rank == order.rank:
        module, _, name = order.call.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, last = name.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, last, _watched(getattr(owner, last), order))


if VARIABLE in os.environ:
    _take_position(Order(**json.loads(os.environ[VARIABLE])))
