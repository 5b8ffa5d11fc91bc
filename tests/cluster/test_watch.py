"""A job in which a rank is stuck, frozen, killed or fails ends by itself, and says which rank on which host it was."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launching import environment
from vitds.cluster.section import ClusterSection, check_world_size
from vitds.cluster.watch.bulletin import KEPT, Bulletin
from vitds.cluster.watch.incidents import can_be_judged, is_of_a_connection, judge, named, one_line
from vitds.cluster.watch.rhythm import Rhythm
from vitds.cluster.watch.stacks import Place, standing
from vitds.data.storage import StorageError
from vitds.errors import UserError
from vitds.sections import parse

HOST = socket.gethostname()
ENDING = ("stuck", "native", "frozen", "killed", "first killed", "killed unnoticed", "raises", "refuses", "first raises", "two raise", "other collective", "all stuck")  # fmt: skip
UNHARMED = ("slow", "saving", "suspended")


# --- real ranks: tests/cluster/stricken.py


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Every case, run once and all at the same time; none of their processes is left."""
    root = tmp_path_factory.mktemp("jobs")
    script = Path(__file__).with_name("stricken.py")
    done = subprocess.run(
        [sys.executable, str(script), str(root), *ENDING, *UNHARMED, "agreed", "alone"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout)


@pytest.mark.parametrize(
    ("case", "codes", "what", "ranks", "words"),
    [
        ("stuck", [1, 1, 1], "hang", [1], f"rank 1 on {HOST} did not arrive at step 4 (step) for "),
        ("stuck", [1, 1, 1], "hang", [1], "s, and stands at cluster/stricken.py:"),
        ("stuck", [1, 1, 1], "hang", [1], f"s ranks 0, 2 on {HOST} were in all_reduce (vitds/dist.py:"),
        ("native", [1, 1, 1], "lost", [1], "gave no sign of life at step 4 (step): dead, frozen, cut off or stuck"),
        ("frozen", [1, None, 1], "lost", [1], f"rank 1 on {HOST} gave no sign of life at step 4"),
        ("killed", [1, 1, -9], "lost", [2], f"rank 2 on {HOST} gave no sign of life at step 4 (step): killed, or"),
        ("first killed", [-9, 1, 1], "lost", [0], f"rank 0 on {HOST} gave no sign of life at step 4 (step): killed"),
        ("killed unnoticed", [1, 1, -9], "lost", [2], f"rank 2 on {HOST} gave no sign of life at step 4 (step): killed, or"),
        ("raises", [1, 1, 1], "crash", [1], f"rank 1 on {HOST} ended at step 4 (step) by its own error: ArithmeticError: seven is not eight. "),
        ("refuses", [1, 1, 1], "refused", [1], f"rank 1 on {HOST} ended at step 4 (step) by its own error: UserError: too many bad images"),
        ("first raises", [1, 1, 1], "crash", [0], f"rank 0 on {HOST} ended at step 4 (step) by its own error: Arith"),
        ("two raise", [1, 1, 1], "crash", [0, 2], f"ranks 0, 2 on {HOST} ended at step 4 (step) by their own error"),
        ("other collective", [1, 1, 1], "hang", [2], f"rank 2 on {HOST} did not arrive at step 4 (step) for "),
        ("all stuck", [1, 1, 1], "hang", [], "3 at cluster/stricken.py:"),
    ],
)  # fmt: skip
def test_one_message_names_the_rank(
    jobs: tuple[Path, dict[str, Any]], case: str, codes: list[int | None], what: str, ranks: list[int], words: str
) -> None:
    root, ended = jobs
    assert ended[case]["codes"] == codes
    said = (root / f"{case}.said").read_text()
    messages = [line for line in said.splitlines() if line.startswith("vitds: ")]
    assert len(messages) == 1, said
    assert words in messages[0]
    (row,) = map(json.loads, (root / case / "events.jsonl").read_text().splitlines())
    judge_rank = row.pop("rank")
    assert judge_rank == next(r for r in range(3) if r not in ranks or what in ("crash", "refused"))
    expected = {
        "kind": "incident",
        "what": what,
        "step": 4,
        "ranks": ranks,
        "hosts": [HOST] if ranks and what != "refused" else [],
    }
    assert row.get("exit_code") == (2 if what == "refused" else None), "a restart would be refused as well"
    assert {key: row[key] for key in expected} == expected
    assert messages[0] == f"vitds: {row['message']}"
    reports = Path(row["reports"])
    assert json.loads((reports / "incident.json").read_text()).items() <= row.items()
    for rank in range(3):
        stacks = (reports / f"rank-{rank:05d}.txt").read_text()
        if codes[rank] == 1:
            assert "stricken.py" in stacks and "steps" in stacks, (rank, stacks)
        else:
            assert stacks == ""
    raised = [json.loads(path.read_text()) for path in root.glob(f"{case}.error-*")]
    assert [error["message"] for error in raised] == [row["message"]] * len(raised), "all ranks know it"
    if what == "crash":
        assert {f"{case}.error-{rank}" for rank in ranks} <= {path.name for path in root.glob(f"{case}.error-*")}


def test_it_ends_in_time(jobs: tuple[Path, dict[str, Any]]) -> None:
    """Bound and grace are 3 and 4 s there; the rank that is stuck in C since its first step has 5 + 5 s."""
    late = {case: jobs[1][case]["seconds"] for case in ENDING if jobs[1][case]["seconds"] > 30}
    assert not late


@pytest.mark.parametrize("case", UNHARMED)
def test_no_false_alarm(jobs: tuple[Path, dict[str, Any]], case: str) -> None:
    root, ended = jobs
    assert ended[case]["codes"] == [0, 0, 0], (root / f"{case}.said").read_text()
    assert "vitds:" not in (root / f"{case}.said").read_text()
    assert not list((root / case).iterdir()), "nothing remains"


def test_what_all_ranks_agreed_on_is_no_incident(jobs: tuple[Path, dict[str, Any]]) -> None:
    root, ended = jobs
    assert ended["agreed"]["codes"] == [1, 1, 1]
    assert [(root / f"agreed.error-{rank}").read_text() for rank in range(3)] == ["null"] * 3
    assert not list((root / "agreed").iterdir())


def test_who_waits_for_a_first_meeting_says_so_alone(jobs: tuple[Path, dict[str, Any]]) -> None:
    root, ended = jobs
    assert ended["alone"]["codes"] == [1, 0, 0]
    said = (root / "alone.said").read_text()
    assert f"vitds: stacks of rank 0 on {HOST}:" in said
    assert "in rank_of" in said
    assert f"vitds: rank 0 on {HOST} made no progress for " in said
    assert "no other rank can be asked" in said


# --- pure


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def rhythm(**section: float) -> tuple[Rhythm, Clock]:
    clock = Clock()
    return Rhythm(ClusterSection(**{"hang_seconds": 5.0, "first_seconds": 60.0, **section}), clock), clock  # type: ignore[arg-type]


def test_a_bound_is_learnt() -> None:
    beats, clock = rhythm()

    def step(number: int, *seconds: float) -> float:
        for interval in seconds:
            clock.now += interval
            beats.beat(number)
        return beats.pulse.bound

    assert beats.pulse.bound == 60
    assert step(0, 30) == 60, "the start is no step"
    assert step(0, 0.5, 2) == 60, "its first is not over"
    assert step(1, 0.125) == 20, "compiled: 10 × 2"
    assert step(1, 0.25) == 20
    assert step(2, 0.75) == 7.5, "only the first: it counts no more"
    assert step(3, 0.125) == 7.5
    for number in range(4, 36):
        step(number, 0.125)
    assert step(36, 0.125) == 5, "forgotten after 32 steps; the least bound"
    assert step(37, 4.5) == 45
    assert beats.pulse.beats == 41
    clock.now += 3
    assert beats.silence(beats.pulse) == 3
    beats.absent += 2
    assert beats.silence(beats.pulse) == 1
    assert step(37, 0) == 45
    assert beats.silence(beats.pulse) == 0, "the absence was before this beat"


def test_what_is_past_its_bound_teaches_nothing() -> None:
    beats, clock = rhythm()
    for number in range(4):
        clock.now += 0.125
        beats.beat(number)
    clock.now += 3600  # suspended
    beats.beat(4)
    assert beats.pulse.bound == 5


def test_phases_have_bounds_of_their_own() -> None:
    beats, clock = rhythm()
    for number in range(4):
        clock.now += 0.75
        beats.beat(number)
    assert beats.pulse.bound == 7.5
    clock.now += 0.25
    beats.enter("evaluation")
    assert (beats.pulse.phase, beats.pulse.bound, beats.silence(beats.pulse)) == ("evaluation", 60, 0)
    for _ in range(3):
        clock.now += 6
        beats.beat(3)
        assert beats.pulse.bound == 60
    beats.leave()
    assert (beats.pulse.phase, beats.pulse.bound, beats.silence(beats.pulse)) == ("step", 7.5, 0)
    clock.now += 0.125
    beats.beat(4)
    assert beats.pulse.bound == 7.5
    beats.enter("evaluation")
    assert beats.pulse.bound == 60, "10 × 6"
    clock.now += 0.3
    beats.beat(4)
    beats.leave()
    beats.enter("evaluation")
    assert beats.pulse.bound == 5, "the first evaluation compiled"
    beats.leave()
    for _ in range(2):
        beats.enter("save", learns=False)
        clock.now += 0.25
        assert beats.pulse.bound == 60
        beats.leave()


def test_zero_is_never() -> None:
    assert rhythm(hang_seconds=0)[0].pulse.bound == math.inf


HOSTS = ["alpha", "alpha", "beta", "beta"]


def report(**more: Any) -> dict[str, Any]:
    return {
        "step": 7, "beats": 20, "phase": "step", "seconds": 301.0, "left": -1.0, "place": "launcher/train.py:104 in train",
        "collective": "all_reduce (vitds/dist.py:117 in any_rank)", "error": None, "connection": False, "gone": [], **more,
    }  # fmt: skip


OUT: dict[str, Any] = {"collective": None, "place": "data/loader.py:60 in take"}
LOST: dict[str, Any] = {"error": "RuntimeError: Connection closed by peer", "connection": True, "left": 200.0}
OWN: dict[str, Any] = {"error": "ValueError: x", "left": 200.0}
BARRIER: dict[str, Any] = {"collective": "barrier (vitds/dist.py:60 in barrier)"}


@pytest.mark.parametrize(
    ("changes", "what", "ranks", "words"),
    [
        ([{}, {}, OUT, {}], "hang", [2], "rank 2 on beta did not arrive at step 7 (step) for 301 s, and stands at data/loader.py:60 in take; for 301 s ranks 0-1 on alpha, rank 3 on beta were in all_reduce (vitds/dist.py:117 in any_rank)"),
        ([{}, {}, {**OUT, "beats": 19}, {"beats": 19}], "hang", [2], "rank 2 on beta did not"),
        ([{}, {}, {"beats": 19}, {"beats": 19}], "hang", [2, 3], "ranks 2-3 on beta did not"),
        ([{}, {}, {**OUT, "beats": 19}, {**OUT, "beats": 20}], "hang", [2], "rank 2 on beta did not"),
        ([{}, BARRIER, {}, {}], "hang", [1], "rank 1 on alpha did not arrive"),
        ([BARRIER, BARRIER, {}, {}], "hang", [], "no progress at step 7 (step) for 301 s on ranks 0-1 on alpha, ranks 2-3 on beta: 2 in barrier (vitds/dist.py:60 in barrier); 2 in all_reduce"),
        ([{}, {}, {}, {}], "hang", [], "4 in all_reduce (vitds/dist.py:117 in any_rank); all are alive, so the network between these hosts, or a device, is stuck. Stacks"),
        ([OUT, OUT, OUT, OUT], "hang", [], "4 at data/loader.py:60 in take. Stacks"),
        ([{}, {}, None, None], "lost", [2, 3], "ranks 2-3 on beta gave no sign of life at step 7 (step): dead, frozen, cut off or stuck in native code; for 301 s ranks 0-1 on alpha were in all_reduce"),
        ([{"gone": [1]}, None, {}, {}], "lost", [1], "rank 1 on alpha gave no sign of life at step 7 (step): killed, or ended without a word"),
        ([{"gone": [1]}, None, None, {}], "lost", [1, 2], "dead, frozen"),
        ([LOST, LOST, None, LOST], "lost", [2], "rank 2 on beta gave no sign"),
        ([LOST, OWN, None, LOST], "crash", [1], "rank 1 on alpha ended at step 7 (step) by its own error: ValueError: x. Stacks"),
        ([OWN, LOST, OWN, {}], "crash", [0, 2], "rank 0 on alpha, rank 2 on beta ended at step 7 (step) by their own error: ValueError: x. Stacks"),
        ([LOST, LOST, LOST, LOST], "lost", [], "ranks 0-1 on alpha, ranks 2-3 on beta lost their connections at step 7 (step), and every rank is alive: RuntimeError: Connection closed"),
        ([LOST, {}, LOST, OUT], "lost", [3], "rank 3 on beta did not arrive"),
        ([LOST, {}, {}, {}], "lost", [], "rank 0 on alpha lost its connections"),
    ],
)  # fmt: skip
def test_who_is_to_blame(changes: list[dict[str, Any] | None], what: str, ranks: list[int], words: str) -> None:
    reports = {rank: report(**change) for rank, change in enumerate(changes) if change is not None}
    incident = judge(reports, HOSTS, "runs/a/incidents/x")
    assert (incident["what"], incident["ranks"], incident["step"]) == (what, ranks, 7)
    assert incident["hosts"] == sorted({HOSTS[rank] for rank in ranks})
    assert words in incident["message"]
    assert incident["message"].endswith(". Stacks of all that could write them: runs/a/incidents/x")
    assert incident["reports"] == "runs/a/incidents/x"


def test_one_rank_alone() -> None:
    incident = judge({0: report(**OUT)}, ["alpha"], "x")
    assert incident["message"].startswith(
        "rank 0 on alpha made no progress at step 7 (step) for 301 s, and stands at data"
    )
    assert (incident["what"], incident["ranks"]) == ("hang", [0])


@pytest.mark.parametrize(
    ("changes", "patience_is_over", "expected"),
    [
        ([{}, {}, {}, {}], False, True),
        ([{}, {}, None, {}], False, False),
        ([{}, {}, None, {}], True, True),
        ([{"gone": [2]}, {}, None, {}], False, True),
        ([{}, {}, {"left": 900.0}, {}], True, False),  # in its first save
        ([{}, {}, {"left": None}, {}], True, True),
        ([{"left": 9.0}, {"left": 9.0}, {"left": 9.0}, {"left": 9.0}], True, False),  # nobody asks any more
        ([LOST, {"left": 9.0}, {"left": 9.0}, {"left": 9.0}], False, True),
        ([LOST, {"left": 9.0}, None, {"left": 9.0}], False, False),
        ([LOST, {"left": 9.0}, None, {"left": 9.0}], True, True),
    ],
)
def test_when_it_can_be_judged(changes: list[dict[str, Any] | None], patience_is_over: bool, expected: bool) -> None:
    reports = {rank: report(**change) for rank, change in enumerate(changes) if change is not None}
    assert can_be_judged(reports, 4, patience_is_over) is expected


def test_many_ranks_are_named_briefly() -> None:
    hosts = [f"n{rank // 8}" for rank in range(128)]
    assert named([0, 1, 2, 5, 9], hosts) == "ranks 0-2, 5 on n0, rank 9 on n1"
    assert named(range(128), hosts).endswith("ranks 56-63 on n7, and 8 more hosts")
    assert named(range(72), hosts).endswith("and 1 more host")


def test_errors_of_connections() -> None:
    assert is_of_a_connection(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:4"))
    assert is_of_a_connection(RuntimeError("NCCL error in: x.cpp:1, remote process exited"))
    assert not is_of_a_connection(RuntimeError("CUDA out of memory"))
    assert not is_of_a_connection(ValueError("Connection closed by peer"))
    assert not is_of_a_connection(StorageError("x.tar: cannot be read (Connection timed out), 6 attempts in 41 s"))
    assert not is_of_a_connection(OSError(28, "No space left on device"))
    outer = ValueError("while stepping")
    outer.__cause__ = RuntimeError("Connection reset by peer")
    assert is_of_a_connection(outer)
    assert one_line(RuntimeError("a\nb")) == "RuntimeError: a"
    assert one_line(KeyError()) == "KeyError"


def test_where_a_thread_stands() -> None:
    train, own = Place("/x/launcher/train.py", 104, "train"), Place("/x/vitds/dist.py", 117, "any_rank")
    torchs = Place("/site/torch/distributed/distributed_c10d.py", 3252, "all_reduce")
    wrapper = Place("/site/torch/distributed/c10d_logger.py", 83, "wrapper")
    engine = Place("/site/deepspeed/runtime/engine.py", 20, "backward")
    assert standing([train]) == ("launcher/train.py:104 in train", None)
    found = standing([train, own, wrapper, torchs])
    assert found == ("vitds/dist.py:117 in any_rank", "all_reduce (vitds/dist.py:117 in any_rank)")
    assert standing([train, own]).collective == "any_rank (launcher/train.py:104 in train)", "waits for the device"
    deep = Place("/site/deepspeed/comm/comm.py", 5, "reduce_scatter_fn")
    assert standing([train, engine, deep, wrapper, torchs]).collective == "all_reduce (launcher/train.py:104 in train)"
    assert standing([train, engine]) == ("launcher/train.py:104 in train", None)
    assert standing([]) == ("unknown", None)


def test_a_bulletin_forgets_what_is_old(tmp_path: Path) -> None:
    home = tmp_path / "incidents"
    for number in range(KEPT + 3):
        Bulletin.create(home, f"2026-{number:02d}")
        one = Bulletin(home / f"2026-{number:02d}", 0, 1)
        if number != 1:
            assert one.claim({"what": "hang"})
            assert not one.claim({"what": "lost"}), "one judges"
        elif number == 1:
            (one.directory / "rank-00007.json").touch()  # of a rank that was killed
        one.close()
    assert [path.name for path in sorted(home.iterdir())] == [f"2026-{n:02d}" for n in range(3, KEPT + 3)]
    Bulletin.create(tmp_path / "other", "x")
    ranks = [Bulletin(tmp_path / "other" / "x", rank, 2) for rank in range(2)]
    for one in ranks:
        one.close()
    assert not (tmp_path / "other").exists()


def test_a_bulletin_counts_answers_to_this_call_only(tmp_path: Path) -> None:
    Bulletin.create(tmp_path / "incidents", "x")
    one, other = (Bulletin(tmp_path / "incidents" / "x", rank, 2) for rank in range(2))
    assert one.call() is None
    first = one.ring()
    assert other.call() == first
    other.post({"call": first["id"], "step": 3})
    assert one.reports(first["id"]) == {1: {"call": first["id"], "step": 3}}
    one.hush()
    assert other.call() is None
    second = other.ring()
    assert one.reports(second["id"]) == {}, "rank 1 may have died since"
    (tmp_path / "incidents" / "x" / "rank-00001.json").write_text('{"call": "')
    assert one.reports(first["id"]) == {}, "half written"
    other.publish(second, {"what": "hang"})
    assert one.call() == {**second, "incident": {"what": "hang"}}
    (tmp_path / "incidents" / "x" / "call.json").write_text('{"id": "1", "inc')
    with pytest.raises(OSError, match="half written"):
        one.call()
    assert one.claim({"what": "hang"})
    other.hush()
    assert one.ring()["incident"] == {"what": "hang"}, "what was judged stays judged"
    assert one.call() is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"min_gpus": 0}, "vitds.cluster.min_gpus: expected at least 1, found 0"),
        ({"min_gpus": 8, "max_gpus": 4}, "vitds.cluster.max_gpus: expected at least min_gpus (8), found 4"),
        ({"hang_seconds": -1.0}, "vitds.cluster.hang_seconds: expected at least 0"),
        ({"hang_seconds": float("inf")}, "vitds.cluster.hang_seconds: expected a finite number"),
        ({"hang_factor": float("nan")}, "vitds.cluster.hang_factor: expected a finite number"),
        ({"first_seconds": 10}, "vitds.cluster.first_seconds: expected at least hang_seconds (300), found 10"),
        ({"straggler_factor": 1}, "vitds.cluster.straggler_factor: expected more than 1, found 1"),
        ({"hang_second": 1}, "vitds.cluster.hang_second: unknown key (did you mean 'hang_seconds'?)"),
    ],
)
def test_a_section_that_cannot_be(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as raised:
        parse(ClusterSection, given, "vitds.cluster")
    assert words in str(raised.value)


def test_a_world_the_run_file_does_not_allow() -> None:
    section = parse(
        ClusterSection, {"min_gpus": 4, "max_gpus": 8, "hang_seconds": 0, "first_seconds": 5}, "vitds.cluster"
    )
    for fits in (4, 8):
        check_world_size(section, fits)
    check_world_size(ClusterSection(), 4096)
    with pytest.raises(UserError, match=r"vitds.cluster.min_gpus is 4, and this start has 3 rank\(s\) on alpha, beta;"):
        check_world_size(section, 3, ["alpha", "alpha", "beta"])
    with pytest.raises(UserError, match=r"vitds.cluster.max_gpus is 8, and this start has 9 ranks; .*max_gpus=9"):
        check_world_size(section, 9)
