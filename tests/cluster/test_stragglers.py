"""A rank that is slower than the others is named, one that only waits for it is not."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launching import ROOT, environment
from vitds.cluster.section import ClusterSection
from vitds.cluster.watch.stragglers import Stragglers, Timer, row, stragglers


def times(data: list[float], forward: list[float], step: float = 1.0) -> list[dict[str, float]]:
    return [{"data": d, "forward": f, "backward": 0.5, "step": step} for d, f in zip(data, forward, strict=True)]


@pytest.mark.parametrize(
    ("data", "forward", "expected"),
    [
        ([0.01, 0.01, 0.01, 0.01], [0.3, 0.3, 0.3, 0.3], []),
        ([0.01, 0.01, 0.01, 0.01], [0.3, 0.3, 0.45, 0.3], [(2, "forward", 0.45, 0.3)]),
        ([0.01, 0.01, 0.01, 0.01], [0.3, 0.3, 0.38, 0.3], []),  # 1.27 ×
        ([0.01, 0.01, 0.01, 0.04], [0.3, 0.3, 0.3, 0.3], []),  # 4 ×, and 3 % of a step
        ([0.0, 0.0, 0.0, 0.2], [0.3, 0.3, 0.3, 0.3], [(3, "data", 0.2, 0.0)]),
        ([0.0, 0.3, 0.0, 0.2], [0.3, 0.3, 0.3, 0.6], [(1, "data", 0.3, 0.0), (3, "data", 0.2, 0.0), (3, "forward", 0.6, 0.3)]),
    ],
)  # fmt: skip
def test_who_is_slow(data: list[float], forward: list[float], expected: list[tuple[Any, ...]]) -> None:
    found = stragglers(times(data, forward), ["alpha", "alpha", "beta", "beta"], 1.3)
    assert [(one["rank"], one["what"], one["seconds"], one["median"]) for one in found] == expected
    assert all(one["host"] == ("alpha" if one["rank"] < 2 else "beta") for one in found)


def test_of_two_ranks_the_slower_is_slow() -> None:
    assert [one["rank"] for one in stragglers(times([0, 0], [0.3, 0.5]), ["a", "b"], 1.3)] == [1]
    assert stragglers(times([0, 0], [0.3, 0.5]), ["a", "b"], 1.3, judged=["data"]) == []
    assert stragglers(times([1e-4, 5e-4], [0, 0], step=1e-3), ["a", "b"], 1.3) == [], "half a millisecond"


def test_the_row_of_a_comparison() -> None:
    found = row(times([0.1, 0.1, 0.4], [0.3, 0.2, 0.1]))
    assert found == {
        "cluster/step_seconds_median": 1.0,
        "cluster/step_seconds_max": 1.0,
        "cluster/data_seconds_median": 0.1,
        "cluster/data_seconds_max": 0.4,
        "cluster/forward_seconds_median": 0.2,
        "cluster/forward_seconds_max": 0.3,
        "cluster/backward_seconds_median": 0.5,
        "cluster/backward_seconds_max": 0.5,
        "cluster/slowest_rank": 2,
    }


def test_a_timer_adds_up_and_starts_anew() -> None:
    clock = iter([10.0, 11.5, 20.0, 20.25, 30.0, 31.0])
    timer = Timer(torch.device("cpu"), clock=lambda: next(clock))
    for _ in range(2):
        with timer:
            pass
    assert timer.take() == 1.75
    assert timer.take() == 0
    with pytest.raises(KeyError), timer:
        raise KeyError
    assert timer.take() == 1.0


def test_alone_there_is_nothing_to_compare() -> None:
    slow = Stragglers(ClusterSection(straggler_every_steps=1), torch.device("cpu"))
    assert slow.compare(1, pytest.fail) == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_is_timed_and_not_waited_for() -> None:
    timer, square = Timer(torch.device("cuda")), torch.randn(8192, 8192, device="cuda")
    square @ square
    torch.cuda.synchronize()
    begin = time.perf_counter()
    with timer:
        for _ in range(50):
            square @ square
    returned = time.perf_counter() - begin
    assert timer.take() == 0, "it is still at it"
    torch.cuda.synchronize()
    took = time.perf_counter() - begin
    assert returned < took / 2
    with timer:
        pass
    torch.cuda.synchronize()
    with timer:
        pass
    assert timer.take() == pytest.approx(took, rel=0.2)


RANK = f"""
import json, os, sys, time, types
package = types.ModuleType("vitds"); package.__path__ = [{str(ROOT / "vitds")!r}]; sys.modules["vitds"] = package
import torch
import torch.distributed as group
root = sys.argv[1]
pids = []
for rank in range(3):
    pids.append(os.fork())
    if pids[-1] == 0:
        break
else:
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))
os.environ |= {{"RANK": str(rank), "WORLD_SIZE": "3"}}
from vitds import dist
from vitds.cluster.section import ClusterSection
from vitds.cluster.watch.stragglers import Stragglers
group.init_process_group("gloo", init_method=f"file://{{root}}/store", rank=rank, world_size=3)
section = ClusterSection(straggler_every_steps=4, straggler_factor=4.0)  # a loaded machine is less unfair
slow = Stragglers(section, torch.device("cpu"))
found = []
for step in range(1, 9):
    with slow.data:
        time.sleep(0.3 if rank == 1 and step > 4 else 0.02)
    with slow.forward:
        time.sleep(0.02)
    with slow.backward:
        dist.barrier()  # the others wait for rank 1
    named = []
    metrics = slow.compare(step, lambda kind, **what: named.append({{"kind": kind, **what}}))
    found.append((metrics, named))
open(f"{{root}}/found-{{rank}}", "w").write(json.dumps(found))
dist.leave(0)
"""


def test_real_ranks_name_the_one_with_the_slow_disk(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, str(tmp_path / "rank.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"found-{rank}").read_text()) for rank in range(3)]
    assert found[0] == found[1] == found[2]
    said = [
        line for line in done.stderr.splitlines() if "slow: data takes" in line
    ]  # a loaded machine may slow other parts
    assert len(said) == 1 and said[0].startswith("vitds: rank 1 on"), done.stderr
    assert "is slow: data takes" in done.stderr
    assert [bool(metrics) for metrics, _ in found[0]] == [False, False, False, True, False, False, False, True]
    (metrics, slow) = found[0][7]
    assert [(one["rank"], one["what"], one["host"], one["step"]) for one in slow if one["what"] == "data"] == [
        (1, "data", socket.gethostname(), 8)
    ]
    assert metrics["cluster/slowest_rank"] == 1
    assert metrics["cluster/data_seconds_max"] >= 0.3 > 0.15 > metrics["cluster/data_seconds_median"]
    assert metrics["cluster/step_seconds_median"] >= 0.3
    assert metrics["cluster/backward_seconds_median"] > 0.15, "the others' wait is no fault of theirs"
    assert not [one for _, events in found[0][:4] for one in events if one["what"] == "data" and one["seconds"] > 0.3]
