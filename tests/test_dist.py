"""What ranks tell each other: a failure of one is every rank's, and objects travel between hosts, not devices."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT, environment
from vitds import dist
from vitds.errors import Preempted, Stopped, UserError

# Imports single rooms without the package's own imports, which take seconds.
RANK = f"""
import datetime, json, os, resource, sys, types
package = types.ModuleType("vitds"); package.__path__ = [{str(ROOT / "vitds")!r}]; sys.modules["vitds"] = package
import torch.distributed as group
from vitds import dist
from vitds.errors import Preempted, Stopped, UserError
rank, root = int(os.environ["RANK"]), sys.argv[1]
group.init_process_group("gloo", init_method=f"file://{{root}}/store", rank=rank, world_size=2,
                         timeout=datetime.timedelta(seconds=20))
found = {{}}
def leave():
    open(f"{{root}}/found-{{rank}}", "w").write(json.dumps(found))
    dist.leave(0)
"""


def two_ranks(root: Path, script: str) -> tuple[list[dict], list[str]]:
    """What two real ranks found and what each wrote to standard error."""
    (root / "rank.py").write_text(RANK + script)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(root / "rank.py"), str(root)],
            env=environment(RANK=str(rank), WORLD_SIZE="2"),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    return [json.loads((root / f"found-{rank}").read_text()) for rank in range(2)], said


FAILURES = """
def fails(errors):
    def action():
        if rank in errors:
            raise errors[rank]
        return f"done {rank}"
    try:
        return dist.together(action)
    except Exception as error:
        return [type(error).__name__, str(error), type(error.__cause__).__name__]
found["nothing"] = fails({})
found["disk"] = fails({0: OSError(5, "Input/output error", "/run")})
found["fault"] = fails({1: AssertionError("three is odd")})
found["user"] = fails({0: UserError("no such key")})
found["stopped"] = fails({1: Stopped("enough")})
found["preempted"] = fails({0: Preempted("SIGTERM"), 1: Preempted("SIGTERM")})
found["two"] = fails({0: RuntimeError("first"), 1: RuntimeError("second")})
found["user last"] = fails({0: RuntimeError("first"), 1: UserError("no such key")})
found["unpicklable"] = fails({0: type("Own", (Exception,), {})("here only")})

groups = []
for name in ("all_gather_object", "broadcast_object_list"):
    def watched(*arguments, call=getattr(group, name), **more):
        groups.append(more.get("group"))
        return call(*arguments, **more)
    setattr(group, name, watched)
group.get_backend = lambda *_: "nccl"  # a second name for the same transport
dist._host_group = (None, None)
found["gathered"], found["told"] = dist.all_objects(rank), dist.broadcast_object(rank)
assert dist.host_group() is not group.group.WORLD
found["groups"] = [one is dist.host_group() for one in groups]
leave()
"""


def test_a_failure_of_one_rank_is_every_rank_s(tmp_path: Path) -> None:
    (first, second), said = two_ranks(tmp_path, FAILURES)
    host = socket.gethostname()
    assert (first.pop("nothing"), second.pop("nothing")) == ("done 0", "done 1")
    disk = f"rank 0 on {host}: OSError: [Errno 5] Input/output error: '/run'"
    assert first.pop("disk") == ["Stopped", disk, "OSError"]
    assert second.pop("disk") == ["Stopped", disk, "NoneType"]
    fault = f"rank 1 on {host}: AssertionError: three is odd"
    assert first.pop("fault") == ["Stopped", fault, "NoneType"]
    assert second.pop("fault") == ["Stopped", fault, "AssertionError"]
    assert [text.count("AssertionError: three is odd") for text in said] == [0, 1], "a traceback where it arose"
    assert "raise errors[rank]" in said[1]
    assert "Input/output" not in said[0], "the disk's troubles need no traceback"
    assert first.pop("two")[1] == second["two"][1] == f"rank 0 on {host}: RuntimeError: first"
    assert second.pop("two")[2] == "RuntimeError", "its own, which is not lost"
    assert first.pop("user last")[:2] == second.pop("user last")[:2] == ["UserError", "no such key"]
    assert (
        first.pop("unpicklable")[:2]
        == second.pop("unpicklable")[:2]
        == ["Stopped", f"rank 0 on {host}: Own: here only"]
    )
    assert first == second
    assert [first[name][:2] for name in ("user", "stopped", "preempted")] == [
        ["UserError", "no such key"],
        ["Stopped", "enough"],
        ["Preempted", "SIGTERM"],
    ]
    assert (first["gathered"], first["told"], first["groups"]) == ([0, 1], 0, [True, True])


def test_a_world_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert dist.host_group() is None
    assert (dist.all_objects("x"), dist.broadcast_object("y"), dist.together(lambda: "z")) == (["x"], "y", "z")
    for error in (UserError("a"), Stopped("b"), Preempted("c")):
        with pytest.raises(type(error)) as raised:
            dist.together(lambda error=error: throw(error))
        assert raised.value is error
    with pytest.raises(Stopped, match=r"^OSError: \[Errno 28\] full$") as raised:
        dist.together(lambda: throw(OSError(28, "full")))
    assert isinstance(raised.value.__cause__, OSError)
    assert capsys.readouterr().err == ""
    with pytest.raises(Stopped, match=r"^ZeroDivisionError: "):
        dist.together(lambda: 1 / 0)
    assert "1 / 0" in capsys.readouterr().err, "the line at fault"


def throw(error: Exception) -> None:
    raise error
