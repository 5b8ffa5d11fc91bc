"""Jobs of a few real ranks that come to grief, each in its own way; run by test_watch.py.

    python stricken.py ROOT CASE …

All cases run at once, forked from one process that has imported everything: ROOT/CASE is a case's output directory, and
ROOT/CASE.said what its ranks wrote. Prints {case: {"codes": [exit code or −signal by rank], "seconds": from the moment
of the trouble to the end of the last rank that could end}}.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import math
import os
import signal
import sys
import time
import traceback
import types
from pathlib import Path

# Single rooms without the package's own imports, which take seconds.
package = types.ModuleType("vitds")
package.__path__ = [str(Path(__file__).resolve().parent.parent.parent / "vitds")]
sys.modules["vitds"] = package

import torch.distributed as group  # noqa: E402

from vitds import dist  # noqa: E402
from vitds.cluster.section import ClusterSection  # noqa: E402
from vitds.cluster.watch import neighbours  # noqa: E402
from vitds.cluster.watch.watching import Watch  # noqa: E402
from vitds.errors import Stopped, UserError  # noqa: E402
from vitds.interruption import Interruption  # noqa: E402
from vitds.json_files import append_row  # noqa: E402

BOUND, GRACE, MARGIN, WORLD, PATIENCE = 3.0, 4.0, 5.0, 3, 60.0
STEP, SUSPENDED = 4, 9.0
neighbours.SETTLE_SECONDS = 0.5


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stuck() -> None:
    time.sleep(1000)


def stuck_in_c() -> None:
    ctypes.PyDLL(None).sleep(1000)  # keeps the interpreter's lock


def fails() -> None:
    raise ArithmeticError("seven is not eight\nnor nine")


def refuses() -> None:
    error = UserError("too many bad images")
    error.agreed = False
    raise error


def stops() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def other_collective() -> None:
    group.barrier()


TROUBLE = {
    "stuck": {1: stuck},
    "native": {1: stuck_in_c},
    "frozen": {1: stops},
    "killed": {2: die},
    "first killed": {0: die},
    "killed unnoticed": {0: stuck, 1: stuck, 2: die},  # as under NCCL: no connection tells the others
    "raises": {1: fails},
    "refuses": {1: refuses},
    "first raises": {0: fails},
    "two raise": {0: fails, 2: fails},
    "other collective": {2: other_collective},
    "all stuck": {0: stuck, 1: stuck, 2: stuck},
}


def steps(case: str, rank: int, watch: Watch, root: Path) -> None:
    """What a training loop does, with the trouble in its fifth step."""
    for step in range(STEP + 1):
        watch.beat(step)
        dist.any_rank([False])
        if step == STEP:
            (root / f"{case}.began-{rank}").touch()
            TROUBLE[case].get(rank, lambda: None)()
            if case == "two raise" and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)  # a launcher's, when another rank has gone
            dist.any_rank([False])
            dist.any_rank([False])
            group.all_reduce(dist.torch.ones(3))


def slow(rank: int, watch: Watch) -> None:
    """Progress, though a step takes longer than the least bound: it is learnt."""
    for step, seconds in enumerate([0.0, 0.9, 0.9, 1.2 * BOUND]):
        watch.beat(step)
        dist.any_rank([False])
        time.sleep(seconds if rank == 0 else seconds / 2)
    with watch.during("evaluation"):
        for _ in range(3):
            watch.beat(step)
            dist.any_rank([False])
            time.sleep(0.7 * BOUND)


def saving(rank: int, watch: Watch) -> None:
    """One rank is in its first save, for much longer than the bound of the step in which the others wait for it."""
    for step in range(4):
        watch.beat(step)
        dist.any_rank([False])
    if rank == 2:
        with watch.during("save"):
            time.sleep(2 * BOUND + GRACE)
    watch.beat(step)
    dist.any_rank([False])
    deadline = time.monotonic() + PATIENCE
    while watch._bulletin.call() is not None:  # the others had called; one that waited in silence might call again
        assert time.monotonic() < deadline
        watch.beat(step)
        time.sleep(0.05)
    dist.any_rank([False])


def suspended(rank: int, watch: Watch, root: Path) -> None:
    """All ranks are stopped, and go on later, for longer than the bound, in the middle of some work."""
    for step in range(4):
        watch.beat(step)
        dist.any_rank([False])
    (root / f"suspended.{rank}").touch()
    while rank == 0 and not (root / "suspended.over").exists():
        time.sleep(0.01)
    dist.any_rank([False])
    watch.beat(step)


def rank_of(case: str, rank: int, root: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank)}
    said = os.open(root / f"{case}.said", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(said, 2)
    output = root / case
    output.mkdir(exist_ok=True)
    bound, first, margin = BOUND, 20.0, MARGIN
    if case == "native":
        first = 5.0
    elif case == "killed unnoticed":
        bound = first = 2 * PATIENCE
    elif case == "suspended":
        bound, margin = SUSPENDED - 2, 60.0
    section = ClusterSection(hang_seconds=bound, hang_factor=6 if case == "slow" else 2, first_seconds=first)

    def fail(incident: dict) -> None:
        append_row(output / "events.jsonl", {"kind": "incident", "rank": rank, **incident})

    with Interruption():
        try:
            with Watch(section, output, GRACE, margin) as watch:
                timeout = datetime.timedelta(seconds=PATIENCE)
                if case == "alone":  # nobody else ever comes
                    watch._rhythm.pulse = watch._rhythm.pulse._replace(bound=BOUND)
                    if rank != 0:
                        dist.leave(0)
                store = f"file://{root}/{case}.store"
                group.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timeout)
                with watch.introduce(fail):
                    if case == "slow":
                        slow(rank, watch)
                    elif case == "saving":
                        saving(rank, watch)
                    elif case == "suspended":
                        suspended(rank, watch, root)
                    elif case == "agreed":
                        raise Stopped("every rank knows")
                    else:
                        steps(case, rank, watch, root)
        except BaseException as error:
            traceback.print_exception(error)
            Path(root / f"{case}.error-{rank}").write_text(json.dumps(getattr(error, "incident", None)))
            os._exit(1)
        dist.leave(0)


def main() -> None:
    root, cases = Path(sys.argv[1]), sys.argv[2:]
    pids = {}
    for case in cases:
        for rank in range(WORLD):
            pid = os.fork()
            if pid == 0:
                try:
                    rank_of(case, rank, root)
                finally:
                    os._exit(99)
            pids[pid] = (case, rank)
    codes: dict[str, list] = {case: [None] * WORLD for case in cases}
    ended: dict[str, float] = {}
    deadline = time.monotonic() + PATIENCE
    resume: float | None = None
    over = math.inf
    while pids and time.monotonic() < deadline:
        for pid, (case, rank) in list(pids.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[case][rank] = os.waitstatus_to_exitcode(status)
                ended[case] = time.time()
                del pids[pid]
        asleep = [pid for pid, (case, _) in pids.items() if case == "suspended"]
        if resume is None and len(list(root.glob("suspended.[0-9]"))) == WORLD:
            resume = time.monotonic() + SUSPENDED
            for pid in asleep:
                os.kill(pid, signal.SIGSTOP)
        elif resume is not None and time.monotonic() > resume:
            for pid in asleep:
                os.kill(pid, signal.SIGCONT)
            resume, over = math.inf, time.monotonic() + 2
        if time.monotonic() > over:  # whoever looks only once after it wakes has looked
            over = math.inf
            (root / "suspended.over").touch()
        if {case for case, _ in pids.values()} == {"frozen"} and codes["frozen"].count(None) == 1:
            break
        time.sleep(0.05)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    began = {case: min((path.stat().st_mtime for path in root.glob(f"{case}.began-*")), default=0.0) for case in cases}
    print(json.dumps({c: {"codes": codes[c], "seconds": ended.get(c, 1e9) - began[c]} for c in cases}))


main()
