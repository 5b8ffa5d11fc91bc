"""How fast the links between hosts are. Standard library and torch only.

The doctor pipes this file, with a call of `main` added, into `python -` on each host. There it makes one process a slot;
all of them join one torch.distributed group, as a training would.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

PINGS = 20
PING_SECONDS = 0.5
"""No more than `PINGS` and about this long per pair, so that a slow link cannot hold up the round."""
BULK_BYTES = (1 << 16, 1 << 22)
"""Sent and returned for a pair's bandwidth; the second only where the first took under BULK_SECONDS."""
BULK_SECONDS = 0.1
ALL_REDUCES, ALL_REDUCE_SECONDS = 3, 2.0
"""How often it is done again, unless the first took longer than this."""


def main(request: Mapping[str, Any]) -> None:
    """Measure with the other hosts, and say what was found, as JSON lines; ends within `limit` seconds.

    Args:
        request: mark and limit, as for the probe; index (of this host), slots (of every host), master (address, port),
            accelerators (NCCL, else gloo), mebibytes (what is reduced).
    """
    index, slots = request["index"], request["slots"]

    def say(**row: Any) -> None:
        print(request["mark"] + json.dumps(row), flush=True)

    say(stage="start")
    import torch  # noqa: F401 - once, before it is forked

    parent, local = os.getppid(), 0
    for other in range(1, slots[index]):
        here = os.getpid()
        if os.fork() == 0:
            parent, local = here, other
            break
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(max(1, int(request["limit"])))
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
    try:
        _measure(request, sum(slots[:index]) + local, local, say if local == 0 else lambda **_: None)
    except Exception as error:
        message = " ".join(str(error).split())[:300]
        if local == 0:
            say(error=f"{type(error).__name__}: {message}")
        sys.stderr.write(f"slot {local}: {message}\n")
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # with process groups alive, an orderly end may abort


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """A tournament in which everyone meets everyone once, all at once in each round: pairs (i, j), i < j, by round."""
    places: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    found = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        met = zip(places[:half], reversed(places[half:]), strict=True)
        found.append(sorted((min(a, b), max(a, b)) for a, b in met if a is not None and b is not None))
        places = [places[0], places[-1], *places[1:-1]]
    return found


def _measure(request: Mapping[str, Any], rank: int, local: int, say: Callable[..., None]) -> None:
    import torch
    import torch.distributed as dist

    index, slots = request["index"], request["slots"]
    bound = timedelta(seconds=request["limit"])
    say(stage="connect", host=socket.gethostname())
    address, port = request["master"]
    store = dist.TCPStore(address, port, is_master=rank == 0, timeout=bound, wait_for_workers=False)
    say(stage="group")
    if request["accelerators"]:
        torch.cuda.set_device(local)
    device = "cuda" if request["accelerators"] else "cpu"
    backend = "nccl" if request["accelerators"] else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=sum(slots), timeout=bound)
    starts = [sum(slots[:i]) for i in range(len(slots))]
    leaders = dist.new_group(starts, backend="gloo", timeout=bound)
    own = [
        dist.new_group(list(range(start, start + n)), backend=backend) for start, n in zip(starts, slots, strict=True)
    ]

    pairs: list[list[float]] = []
    if local == 0:
        for matches in rounds(len(slots)):
            for i, j in matches:
                if index in (i, j):
                    say(stage="pair", other=j if index == i else i)
                if index == i:
                    pairs.append([i, j, *_ask(dist, starts[j], leaders)])
                elif index == j:
                    _return(dist, starts[i], leaders)
    say(stage="all-reduce")
    found = {"index": index, "pairs": pairs, "own": None}
    tensor = torch.ones(request["mebibytes"] << 18, device=device)
    if slots[index] > 1:
        found["own"] = _all_reduce(dist, tensor, own[index], slots[index])
    found["all"] = _all_reduce(dist, tensor, None, sum(slots)) if sum(slots) > 1 else None
    say(stage="done", **found)
    store.set(f"end {rank}", "")
    if rank == 0:  # it holds the store, and leaves last
        store.wait([f"end {other}" for other in range(sum(slots))], bound)


def _ask(dist: Any, peer: int, group: Any) -> tuple[float, float]:
    """(best round trip in s, mean bandwidth of the two ways in bytes/s) to a peer that is in `_return`."""
    import torch

    def there_and_back(payload: Any) -> float:
        started = time.perf_counter()
        length = torch.tensor([payload.numel()])
        dist.send(length, peer, group)
        if payload.numel() > 1:
            dist.send(payload, peer, group)
        dist.recv(payload if payload.numel() > 1 else length, peer, group)
        return time.perf_counter() - started

    small = torch.zeros(1, dtype=torch.uint8)  # its length goes alone: one message each way
    there_and_back(small)
    until, trips = time.perf_counter() + PING_SECONDS, list[float]()
    while len(trips) < 3 or (len(trips) < PINGS and time.perf_counter() < until):
        trips.append(there_and_back(small))
    trip, bandwidth = min(trips), 0.0
    for size in BULK_BYTES:
        took = there_and_back(torch.zeros(size, dtype=torch.uint8))
        bandwidth = 2 * size / max(took - trip, 1e-6)
        if took > BULK_SECONDS:
            break
    dist.send(torch.tensor([0]), peer, group)
    return trip, bandwidth


def _return(dist: Any, peer: int, group: Any) -> None:
    """Give back what the peer sends, until it sends nothing."""
    import torch

    length = torch.zeros(1, dtype=torch.int64)
    while True:
        dist.recv(length, peer, group)
        if not length.item():
            return
        if length.item() == 1:
            dist.send(length, peer, group)
            continue
        payload = torch.empty(int(length.item()), dtype=torch.uint8)
        dist.recv(payload, peer, group)
        dist.send(payload, peer, group)


def _all_reduce(dist: Any, tensor: Any, group: Any, ranks: int) -> float:
    """Bandwidth of the slowest link of a ring, bytes/s: each passes on 2 (n − 1)/n of the tensor; best of a few."""
    import torch

    def once() -> float:
        started = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    slowest = torch.tensor([once()], device=tensor.device)  # the first opens connections
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    best = float(slowest)
    if best < ALL_REDUCE_SECONDS:  # on every rank or on none
        best = min(once() for _ in range(ALL_REDUCES))
    return float(2 * (ranks - 1) / ranks * tensor.numel() * tensor.element_size() / best)


def _end_after(parent: int) -> None:
    """End this process when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
