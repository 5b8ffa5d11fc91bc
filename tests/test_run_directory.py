"""The run directory: one owner (real processes that hold it, die and hang), atomic files, no mixing of two runs."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tests.test_dist import two_ranks
from vitds import lease
from vitds.errors import Preempted, UserError
from vitds.identity import differences
from vitds.json_files import write_json
from vitds.run_directory import RunDirectory

RUN = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 8,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "ModifiedAdafactor", "params": {"lr": 1e-3, "weight_decay": 0.03}},
    "tensorboard": {"enabled": True},
    "vitds": {
        "model": {"variant": "ViT-S/16", "num_classes": 10},
        "groups": [["head", {"weight_decay": 3.0}]],
        "train": {"total_steps": 100, "seed": 0},
        "checkpoint": {"every_steps": 10},
    },
}

FORK = multiprocessing.get_context("fork")


def _hold(directory: Path, answers: Connection) -> None:
    answers.send("ready")
    answers.recv()
    try:
        RunDirectory(directory).acquire(wait_seconds=0)
        answers.send("held")
    except UserError as error:
        answers.send(str(error))
    answers.recv()


@contextmanager
def other_processes(directory: Path, number: int = 1) -> Iterator[list[tuple[BaseProcess, str]]]:
    """Processes that try to own the directory, all at one time, and what became of each; they live on in the block."""
    started = []
    for _ in range(number):
        here, there = FORK.Pipe()
        process = FORK.Process(target=_hold, args=(directory, there), daemon=True)
        process.start()
        started.append((process, here))
    try:
        for step in ("ready", "go"):
            for _, here in started:
                if step == "ready":
                    assert here.recv() == "ready"
                else:
                    here.send("go")
        yield [(process, here.recv()) for process, here in started]
    finally:
        for process, _ in started:
            process.kill()
            process.join()


def set_at(run: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """A copy of the run file with one key changed."""
    changed = json.loads(json.dumps(run))
    *parents, last = dotted.split(".")
    place = changed
    for word in parents:
        place = place[word]
    place[last] = value
    return changed


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def held_by(path: Path, **holder: Any) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "lease.json").write_text(json.dumps(holder))


def owner(path: Path) -> dict[str, Any]:
    return json.loads((path / "lease.json").read_text())


def test_a_living_owner_is_named_and_a_killed_one_succeeded(tmp_path: Path) -> None:
    with other_processes(tmp_path) as [(process, answer)]:
        assert answer == "held"
        assert owner(tmp_path)["pid"] == process.pid
        for wait in (0, 0.2):
            with pytest.raises(
                UserError, match=rf"in use by host {socket.gethostname()}, pid {process.pid} .*\d s ago"
            ):
                RunDirectory(tmp_path).acquire(wait_seconds=wait)
        assert owner(tmp_path)["pid"] == process.pid, "the loser leaves the owner's lease alone"
        process.kill()
        until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
        with RunDirectory(tmp_path):  # not even reaped by its parent yet
            assert owner(tmp_path)["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == [], "released, and nothing left behind"


def test_waits_for_an_owner_who_is_about_to_finish(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with other_processes(tmp_path) as [(process, _)]:
        end = threading.Timer(0.3, process.kill)
        end.start()
        with RunDirectory(tmp_path):
            assert owner(tmp_path)["pid"] == os.getpid()
        end.join()
    assert capsys.readouterr().err.count("waiting") == 1


@pytest.mark.parametrize("before", [None, {"host": "elsewhere", "pid": 1, "time": 1e9}])
def test_of_many_starts_at_once_one_wins(tmp_path: Path, before: dict[str, Any] | None) -> None:
    for round in range(5):
        if before:
            held_by(tmp_path / str(round), **before)
        else:
            (tmp_path / str(round)).mkdir()
        with other_processes(tmp_path / str(round), 6) as outcomes:
            [winner] = [process for process, answer in outcomes if answer == "held"]
            assert owner(tmp_path / str(round))["pid"] == winner.pid
            assert sum("in use by" in answer for _, answer in outcomes) == 5
            assert os.listdir(tmp_path / str(round)) == ["lease.json"]


def test_successors_take_turns(tmp_path: Path) -> None:
    """Only while no other is at it, and only the lease that was judged, is a dead owner's lease removed."""
    stale = {"host": "elsewhere", "pid": 1, "time": 1e9}
    held_by(tmp_path, **stale)
    turn = tmp_path / "lease.json.succession"
    turn.write_text(json.dumps({"host": "third", "pid": 2, "time": time.time()}))
    with pytest.raises(UserError, match="in use by"):
        RunDirectory(tmp_path).acquire(wait_seconds=0.2)
    assert owner(tmp_path) == stale
    turn.write_text(json.dumps({"host": "third", "pid": 2, "time": time.time() - 61}))
    with RunDirectory(tmp_path) as run:
        quick = owner(tmp_path)
        assert run._lease._removed(json.dumps(stale).encode())
        assert owner(tmp_path) == quick
    assert list(tmp_path.iterdir()) == []


def test_the_lease_of_another_host(tmp_path: Path) -> None:
    held_by(tmp_path / "fresh", host="elsewhere", pid=7, time=time.time() - 30)
    with pytest.raises(UserError, match=r"in use by host elsewhere, pid 7 \(lease renewed 3\d s ago\)"):
        RunDirectory(tmp_path / "fresh").acquire(wait_seconds=0.2)
    held_by(tmp_path / "stale", host="elsewhere", pid=7, time=time.time() - 61)
    with RunDirectory(tmp_path / "stale"):
        assert owner(tmp_path / "stale")["pid"] == os.getpid()


def test_a_pid_used_again_is_not_the_owner(tmp_path: Path) -> None:
    """This very process has the pid, but another start time; in another container the pid means nothing here."""
    me = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    held_by(tmp_path / "again", **me, started=1)
    with RunDirectory(tmp_path / "again"):
        pass
    held_by(tmp_path / "hung", **{**me, "time": time.time() - 1000})
    with pytest.raises(UserError, match="in use by"):
        RunDirectory(tmp_path / "hung").acquire(wait_seconds=0)
    held_by(tmp_path / "container", **me | {"pid": 2**22 + 1}, machine="another")
    with pytest.raises(UserError, match="in use by"):
        RunDirectory(tmp_path / "container").acquire(wait_seconds=0)


@pytest.mark.parametrize("torn", [b"", b'{"host": "a", "pi', b"[1]", b'{"host": "a"}', b"\xff\x00"])
def test_a_torn_lease_runs_out(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "lease.json"
    path.write_bytes(torn)
    with pytest.raises(UserError, match="cannot be read"):
        RunDirectory(tmp_path).acquire(wait_seconds=0)
    os.utime(path, (time.time() - 16, time.time() - 16))
    with RunDirectory(tmp_path):
        assert owner(tmp_path)["pid"] == os.getpid()


def test_an_owner_renews_and_notices_its_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.01)
    run = RunDirectory(tmp_path)
    run.acquire()
    first = owner(tmp_path)["time"]
    until(lambda: owner(tmp_path)["time"] > first)
    thief = {"host": "elsewhere", "pid": 7, "time": time.time(), "token": "another"}

    def stolen() -> bool:
        # A renewal that has just read its own name may still come after a theft; so steal until it is noticed.
        write_json(tmp_path / "lease.json", thief)
        return run._lease._lost_to is not None

    until(stolen)
    with pytest.raises(RuntimeError, match=r"now belongs to host elsewhere, pid 7"):
        run.event("save")
    assert not (tmp_path / "events.jsonl").exists()
    run.release()
    assert owner(tmp_path)["host"] == "elsewhere"


@pytest.mark.parametrize("trouble", ["missing", "torn"])
def test_a_lease_that_nobody_took_is_written_again(
    tmp_path: Path, trouble: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.01)
    path = tmp_path / "lease.json"
    with RunDirectory(tmp_path) as run:
        token = owner(tmp_path)["token"]
        if trouble == "missing":
            path.unlink()
        else:
            # Until a renewal that had read its own name just before is no longer to come.
            until(lambda: path.write_bytes(b"{") == 1 and "cannot be renewed (its text" in capsys.readouterr().err)
            assert path.read_bytes() == b"{", "it may be a successor's who is just writing"
            os.utime(path, (time.time() - 16, time.time() - 16))
        until(lambda: path.exists() and path.read_bytes().endswith(b"\n"))  # a whole one, not one just created
        run.check_owner()
        assert owner(tmp_path)["token"] == token
        run.event("save")
    assert os.listdir(tmp_path) == ["events.jsonl"]


def test_a_lease_missing_after_a_long_silence_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run took it meanwhile, and has ended."""
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.01)
    monkeypatch.setattr(lease, "STALE_SECONDS", -1.0)
    run = RunDirectory(tmp_path)
    run.acquire()

    def removed() -> bool:
        (tmp_path / "lease.json").unlink(missing_ok=True)
        return run._lease._lost_to is not None

    until(removed)
    with pytest.raises(RuntimeError, match="now belongs to another run, which took it"):
        run.event("save")
    run.release()
    assert list(tmp_path.iterdir()) == []


OWNERS = """
from pathlib import Path
from vitds import lease
from vitds.json_files import write_json
from vitds.run_directory import RunDirectory

def run(name, body):
    \"\"\"How a run in a directory of that name ends on this rank, and what its outcome.json then says.\"\"\"
    path = Path(root, name)
    try:
        with dist.together(lambda: RunDirectory(path)) as directory:
            dist.together(lambda: directory.write_config({"train_batch_size": 8}, {}))
            dist.barrier()
            body(path, directory)
        end = None
    except Exception as error:
        end = f"{type(error).__name__}: {error}"
    if name == "alone" and rank == 1:
        dist.barrier(), dist.barrier()
    dist.barrier()
    outcome = path / "outcome.json"
    found[name] = [end, outcome.exists() and json.loads(outcome.read_text())["state"]]
    dist.barrier()

def taken(path, directory):
    if rank == 0:
        write_json(path / "lease.json", {"host": "elsewhere", "pid": 7, "time": 2e9, "token": "another"})
        write_json(path / "outcome.json", {"state": "finished"})
    dist.barrier()
    raise RuntimeError("too late")

def given_back(path, directory):
    if rank == 0:
        directory.finished(3, {})
        directory.release()
    dist.barrier()
    raise RuntimeError("too late")

def alone(path, directory):
    if rank == 1:
        raise RuntimeError("this rank alone")
    dist.barrier()  # met by the other rank when all is over for it
    found["while rank 0 lives"] = json.loads((path / "outcome.json").read_text())["state"]
    dist.barrier()

def full(path, directory):
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, -1))
    dist.together(lambda: directory.write_config({"train_batch_size": 8}, {}))

for body in (taken, given_back, alone, full):
    run(body.__name__, body)
run("no lease", None)
if rank == 0:
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
leave()
"""


def test_two_ranks_of_one_job(tmp_path: Path) -> None:
    """Every rank may say that the run failed, but only its own; and what fails on rank 0 alone ends both."""
    (first, second), _ = two_ranks(tmp_path, OWNERS)
    assert first["taken"] == second["taken"] == ["RuntimeError: too late", "finished"]
    assert owner(tmp_path / "taken")["token"] == "another"
    assert first["given_back"] == second["given_back"] == ["RuntimeError: too late", "finished"]
    assert (first.pop("while rank 0 lives"), first["alone"][0]) == ("failed", None)
    assert second["alone"] == ["RuntimeError: this rank alone", "failed"]
    for name in ("full", "no lease"):
        assert first[name] == second[name]
        assert first[name][0].startswith(
            f"Stopped: rank 0 on {socket.gethostname()}: OSError: [Errno 27] File too large"
        )


def test_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with RunDirectory(tmp_path / "run") as run:
        run.write_config(RUN, {})
        run.event("start")
        run.outcome("finished", 0, 100)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("below", ["", "/run"])
def test_a_path_that_is_a_file(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"/file is a file, not a directory"):
        RunDirectory(f"{tmp_path}/file{below}")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_path_that_cannot_be_written() -> None:
    with pytest.raises(UserError, match="output directory /proc/run cannot be written"):
        RunDirectory("/proc/run")


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("train_batch_size", 128, "train_batch_size: 64 → 128"),
        ("optimizer.params.lr", 1e-2, "optimizer.params.lr: 0.001 → 0.01"),
        ("optimizer.type", "Adam", 'optimizer.type: "ModifiedAdafactor" → "Adam"'),
        ("vitds.model.variant", "ViT-B/16", 'vitds.model.variant: "ViT-S/16" → "ViT-B/16"'),
        ("vitds.model.pool", "gap", 'vitds.model.pool: (not set) → "gap"'),
        ("vitds.groups", [], "vitds.groups: "),
        ("vitds.train.seed", 1, "vitds.train.seed: 0 → 1"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, key: str, value: Any, line: str) -> None:
    run = RunDirectory(tmp_path)
    run.write_config(RUN, {})
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError) as raised:
        RunDirectory(tmp_path).write_config(set_at(RUN, key, value), {})
    assert line in str(raised.value)
    assert str(raised.value).count("→") == 2, "the heading's, and the one difference"
    assert (tmp_path / "config.json").read_bytes() == before


def test_an_order_is_another_run_where_it_says_anything(tmp_path: Path) -> None:
    order = {"kind": "full", "run_images": 16}
    RunDirectory(tmp_path / "before").write_config(RUN, {})  # when there was no other order, and no key
    RunDirectory(tmp_path / "before").refuse_other_run(set_at(RUN, "vitds.data", {"order": order}), {})

    run = RunDirectory(tmp_path / "run")
    run.write_config(set_at(RUN, "vitds.data", {"order": order}), {})
    run.refuse_other_run(set_at(RUN, "vitds.data", {"order": order | {"run_images": 4}}), {})
    with pytest.raises(UserError, match='order.kind: "full" → "windowed"'):
        run.refuse_other_run(set_at(RUN, "vitds.data", {"order": order | {"kind": "windowed"}}), {})


IMAGES = {"train": {"images": 9, "digest": "ab"}, "eval": {"images": 4, "digest": "cd"}}


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"images": 8, "digest": "ef"}, "9 images then, 8 now"),
        ({"images": 9, "digest": "ef"}, "9 images as before, but"),
    ],
)
def test_other_training_images_are_another_run(tmp_path: Path, training: dict[str, Any], said: str) -> None:
    RunDirectory(tmp_path).write_config(RUN, IMAGES)
    run = RunDirectory(tmp_path)
    for refuse in (run.refuse_other_run, run.write_config):
        with pytest.raises(UserError, match=f"holds a run on other training images: {said}"):
            refuse(RUN, IMAGES | {"train": training})
    assert json.loads((tmp_path / "images.json").read_text()) == IMAGES
    run.write_config(RUN, IMAGES)
    assert not (tmp_path / "events.jsonl").exists()


def test_another_minival_is_another_run(tmp_path: Path) -> None:
    """Its images were not trained on, or now are."""
    held_out = set_at(RUN, "vitds.data", {"minival": 0.02})
    RunDirectory(tmp_path).write_config(held_out, IMAGES)
    fewer = IMAGES | {"train": {"images": 8, "digest": "ef"}, "minival": {"images": 1, "digest": "gh"}}
    for other in (set_at(RUN, "vitds.data", {"minival": 1}), RUN):
        with pytest.raises(UserError, match=r"^vitds\.data\.minival: .*9 images then, 8 now\. Set it to 0\.02 again"):
            RunDirectory(tmp_path).refuse_other_run(other, fewer)


def test_other_evaluation_images_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, fewer = RunDirectory(tmp_path), IMAGES | {"eval": {"images": 3, "digest": "ef"}}
    run.write_config(RUN, {"train": IMAGES["train"]})
    run.write_config(RUN, IMAGES)  # an evaluation that there was not before
    assert capsys.readouterr().err == ""
    run.refuse_other_run(RUN, fewer)
    run.write_config(RUN, fewer)
    assert "vitds.data.eval: other images than at the last start: 4 images then, 3 now" in capsys.readouterr().err
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (event["kind"], event["role"]) == ("images", "eval")
    assert json.loads((tmp_path / "images.json").read_text()) == fewer


def test_what_may_change_is_kept_and_told(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.stored_config() is None
    run.write_config(RUN, {})
    changed = RUN
    for key, value in {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization.stage": 3,
        "bf16.enabled": False,
        "tensorboard.enabled": False,
        "vitds.train.total_steps": 200,
        "vitds.checkpoint.every_steps": 5,
    }.items():
        changed = set_at(changed, key, value)
    run.write_config(changed, {})
    run.write_config(changed, {})
    assert run.stored_config() == changed
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events] == ["config"]
    assert "vitds.train.total_steps: 100 → 200" in events[0]["changes"]
    assert len(events[0]["changes"]) == 6


def test_directories_that_are_no_run_s(tmp_path: Path) -> None:
    (tmp_path / "orphans/checkpoints/step-000000010").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds checkpoints but no config\.json"):
        RunDirectory(tmp_path / "orphans").write_config(RUN, {})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text('{"a": 1,\n')
    with pytest.raises(UserError, match=r"config.json cannot be read: .*line 2"):
        RunDirectory(tmp_path / "broken").write_config(RUN, {})
    assert (tmp_path / "broken/config.json").read_text() == '{"a": 1,\n'


def test_differences() -> None:
    assert differences({"a": 1, "b": None, "c": {"d": []}}, {"a": 1.0, "c": None}) == []
    assert differences({"a": 0}, {"a": None}) == ["a: 0 → (not set)"]
    assert differences(None, {"a": {"b": 1}}) == ["a.b: (not set) → 1"]
    assert differences({"a": False, "b": [1]}, {"a": "", "b": [2]}) == ['a: false → ""', "b: [1] → [2]"]


def test_events_and_outcome(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.event("start", world_size=2)
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"time": 1, "ki')  # killed while writing
    run.event("skip", step=3, loss=float("nan"))
    first, _, last = (tmp_path / "events.jsonl").read_text().splitlines()
    assert json.loads(first)["world_size"] == 2
    assert (event := json.loads(last))["kind"] == "skip"
    assert event["loss"] is None
    assert event["time"] > 1e9
    run.outcome("running", None, 3)
    run.outcome("preempted", 75, 12)
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome.pop("time") > 1e9
    assert outcome == {"state": "preempted", "exit_code": 75, "step": 12}
    assert sorted(os.listdir(run)) == ["events.jsonl", "outcome.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, float("inf")]})
    assert json.loads(path.read_text()) == {"a": [1, None]}
    with pytest.raises(UnicodeEncodeError):
        write_json(path, {"a": "\ud800"})
    assert json.loads(path.read_text()) == {"a": [1, None]}
    assert os.listdir(tmp_path) == ["a.json"]


def broken(run: RunDirectory, error: Exception, checkpoint: str = "") -> None:
    """A run that leaves a directory of that name and ends with `error`."""
    with run:
        run.write_config({}, {})
        (run.checkpoints / checkpoint).mkdir(parents=True)
        if isinstance(error, Preempted):
            run.preempted(3, "SIGTERM")
        raise error


def test_a_failure_points_to_the_last_checkpoint(tmp_path: Path) -> None:
    for name, where in (("step-000000020.tmp", "there is no checkpoint yet"), ("step-000000010", "step-000000010;")):
        run, error = RunDirectory(tmp_path), RuntimeError("disk on fire")
        with pytest.raises(RuntimeError):
            broken(run, error, name)
        assert where in error.__notes__[0]
    assert json.loads((tmp_path / "outcome.json").read_text())["step"] == 10
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()][1:]
    assert event["reason"] == "RuntimeError: disk on fire"


@pytest.mark.parametrize(("error", "state", "code"), [(UserError("x"), "failed", 2), (Preempted("x"), "preempted", 75)])
def test_the_outcome_of_an_error_that_is_none_of_ours(tmp_path: Path, error: Exception, state: str, code: int) -> None:
    with pytest.raises(type(error)):
        broken(RunDirectory(tmp_path), error)
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert (outcome["state"], outcome["exit_code"]) == (state, code)
    assert not (tmp_path / "lease.json").exists()


def test_a_failure_before_the_directory_is_known_to_be_ours_leaves_no_outcome(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), RunDirectory(tmp_path):
        raise RuntimeError("no config yet")
    assert not (tmp_path / "outcome.json").exists()


def ended(run: RunDirectory, trouble: Callable[[], Any]) -> BaseException:
    """What comes out of a run that ends with an error amid this trouble: that error."""
    error = RuntimeError("the reason")

    def end() -> None:
        with run:
            run.write_config(RUN, {})
            trouble()
            raise error

    with pytest.raises(RuntimeError) as raised:
        end()
    assert raised.value is error
    return error


def test_nothing_hides_the_error_that_ended_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not a directory of checkpoints that cannot be listed, nor events that cannot be written."""
    run = RunDirectory(tmp_path)

    def trouble() -> None:
        (tmp_path / "events.jsonl").mkdir()
        run.checkpoints = tmp_path / ("x" * 300)  # ENAMETOOLONG: one that a glob does not take for an absence

    error = ended(run, trouble)
    assert "cannot be read ([Errno 36]" in error.__notes__[0]
    assert json.loads((tmp_path / "outcome.json").read_text())["state"] == "failed"
    assert not (tmp_path / "lease.json").exists()
    assert capsys.readouterr().err.count("events.jsonl cannot be written") == 1


def test_a_fault_in_the_last_words_does_not_hide_the_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(tmp_path)
    ended(run, lambda: setattr(run, "_outcome", None))
    assert "vitds: while a run ended with RuntimeError: TypeError: " in capsys.readouterr().err
    assert not (tmp_path / "lease.json").exists()
