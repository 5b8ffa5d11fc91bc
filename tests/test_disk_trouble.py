"""A disk that is full or gone away from checkpoints: logs are lost and said, what a run's truth rests on stops it."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from vitds import lease
from vitds.checkpoint.directory import make_directory
from vitds.errors import Stopped, UserError
from vitds.json_files import Expendable
from vitds.metrics import MonitorSections, Recorder, monitor_sections, read_metrics
from vitds.run_directory import RunDirectory


@contextmanager
def full_disk(size: int = 0) -> Iterator[None]:
    """Files cannot grow beyond `size` bytes (EFBIG, an OSError as ENOSPC is)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def mount(*arguments: object) -> None:
    if subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode:
        pytest.skip("mount is not permitted here")


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, and a second place (`mounted`) where it can be seen as long as it is mounted there."""
    place, mounted = tmp_path / "disk", tmp_path / "mounted"
    for path in (place, mounted):
        path.mkdir()
    mount("-t", "tmpfs", "-o", "size=1m", "none", place)
    try:
        mount("--bind", place, mounted)
        yield place, mounted
    finally:
        for path in (mounted, mounted, place):
            subprocess.run(["umount", "-l", path], capture_output=True)


def said_until(capsys, words: str) -> str:
    deadline, said = time.monotonic() + 20, ""
    while words not in said:
        assert time.monotonic() < deadline, said
        said += capsys.readouterr().err
        time.sleep(0.005)
    return said


@pytest.mark.parametrize("below", ["", "run"])
def test_a_mount_that_goes_away_and_comes_back(disk, below, capsys, monkeypatch):
    """The run goes on without its logs, writes nothing where the mount was, and owns its directory as before."""
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.01)
    place, mounted = disk
    run = mounted / below
    save = run / "checkpoints" / "step-000000001.tmp"
    with RunDirectory(run) as directory:
        directory.write_config({"train_batch_size": 8}, {})
        recorder = Recorder(run, MonitorSections(), 10, 64, stream=io.StringIO())
        make_directory(save, 0)
        subprocess.run(["umount", "-l", mounted], check=True)
        said = said_until(capsys, "cannot be renewed")
        directory.check_owner()
        directory.event("save")
        directory.outcome("running", None, 1)
        recorder.record(1, {"train/loss": 1.0})
        with pytest.raises(OSError, match=f"the directory {run} has vanished"):
            make_directory(save, 0)
        with pytest.raises(Stopped, match="skips.json cannot be written"):
            directory.add_skip(0, 8)
        directory.fail(error := RuntimeError("the reason"))
        assert f"cannot be read (the directory {run} has vanished" in error.__notes__[0]
        assert list(mounted.iterdir()) == [], "what is written here would be lost under the mount"
        before = json.loads((place / below / "lease.json").read_text())["time"]
        mount("--bind", place, mounted)
        said += said_until(capsys, "is renewed again")
        assert said.count("cannot be renewed") == said.count("is renewed again") == 1
        assert json.loads((run / "lease.json").read_text())["time"] > before
        directory.event("finish")
        recorder.record(2, {"train/loss": 1.0})
        make_directory(save, 0)
    assert kinds(run) == ["finish"]
    assert [row["step"] for row in read_metrics(run)] == [2]
    assert not (run / "lease.json").exists()


@pytest.mark.parametrize("error", [None, RuntimeError("the reason")])
def test_a_disk_that_is_read_only_at_the_end(disk, error, capsys):
    place, _ = disk
    with pytest.raises(RuntimeError, match="the reason") if error else nullcontext():
        with RunDirectory(place) as directory:
            directory.write_config({"train_batch_size": 8}, {})
            directory.outcome("running", None, 0)
            mount("-o", "remount,ro", place)
            if error:
                raise error
    assert (place / "lease.json").exists()
    said = capsys.readouterr().err
    assert said.count(f"{place / 'lease.json'} cannot be removed ([Errno 30]") == 1
    assert said.count("outcome.json cannot be written ([Errno 30]") == bool(error)


def test_saves_never_make_a_run_directory_again(tmp_path):
    run = tmp_path / "run"
    directory = RunDirectory(run)
    run.rename(tmp_path / "elsewhere")
    save = directory.checkpoints / "step-000000001.tmp"
    with pytest.raises(OSError, match=f"the directory {run} has vanished$"):
        make_directory(save, 0)
    assert not run.exists()
    run.mkdir()
    with pytest.raises(OSError, match=f"the directory {run} has vanished, and another one is in its place"):
        make_directory(save, 0)
    assert list(run.iterdir()) == []
    RunDirectory(run)
    make_directory(save, 0)
    assert save.is_dir()


def test_a_range_that_is_no_whole_batch_is_refused_by_name(tmp_path):
    text = json.dumps({"skips": [{"start": 0, "end": 16}, {"start": 24, "end": 28}]})
    with RunDirectory(tmp_path) as directory:
        (tmp_path / "skips.json").write_text(text)
        assert directory.skips == [(0, 16), (24, 28)], "no batch is known yet"
        directory.write_config({"train_batch_size": 8}, {})
        message = rf"^{tmp_path / 'skips.json'}: skips\[1\]: expected whole batches of 8 \(train_batch_size\)"
        with pytest.raises(UserError, match=message):
            _ = directory.skips
        with pytest.raises(UserError, match=message):
            directory.add_skip(32, 40)
    assert (tmp_path / "skips.json").read_text() == text


def kinds(directory: Path) -> list[str]:
    return [json.loads(line)["kind"] for line in (directory / "events.jsonl").read_text().splitlines() if line]


def test_events_and_outcome_on_a_full_disk_are_lost_and_said_once(tmp_path, capsys):
    with RunDirectory(tmp_path) as directory:
        directory.event("start")
        directory.outcome("running", None, 0)
        with full_disk():
            for _ in range(3):
                directory.event("save")
                directory.outcome("finished", 0, 5)
            directory.add_bad_samples([{"role": "train", "key": "a/1.png", "reason": "torn", "position": 7}])
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 3
        assert all(line.startswith(f"vitds: {tmp_path}") and line.endswith("; going on") for line in said)
        assert json.loads((tmp_path / "outcome.json").read_text())["state"] == "running"
        directory.event("preempt")
        directory.outcome("preempted", 75, 5)
        said = capsys.readouterr().err.splitlines()
        assert sorted(said) == [
            f"vitds: {tmp_path / name} can be written again; 3 lost" for name in ("events.jsonl", "outcome.json")
        ]
        directory.event("finish")
        assert capsys.readouterr().err == ""
    assert kinds(tmp_path) == ["start", "preempt", "finish"]
    assert json.loads((tmp_path / "outcome.json").read_text())["state"] == "preempted"
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_row_torn_by_a_full_disk_does_not_swallow_the_next(tmp_path):
    with RunDirectory(tmp_path) as directory:
        directory.event("start")
        with full_disk((tmp_path / "events.jsonl").stat().st_size + 10):
            directory.event("save")
        assert not (tmp_path / "events.jsonl").read_text().endswith("\n")
        directory.event("finish")
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["kind"] == "finish"


def test_a_vanished_run_directory_does_not_end_the_run(tmp_path, capsys):
    run = tmp_path / "run"
    directory = RunDirectory(run)
    recorder = Recorder(run, MonitorSections(), 10, 64, stream=io.StringIO())
    run.rename(tmp_path / "elsewhere")
    run.write_text("a file where the mount was")
    directory.event("save")
    directory.outcome("running", None, 1)
    directory.fail(RuntimeError("the disk is gone"))
    recorder.record(1, {"train/loss": 1.0})
    recorder.close()
    assert capsys.readouterr().err.count("cannot be written") == 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own writer
def test_metrics_and_monitors_on_a_full_disk(tmp_path, capsys):
    console = io.StringIO()
    sections = monitor_sections({"csv_monitor": {"enabled": True}, "tensorboard": {"enabled": True}})
    recorder = Recorder(tmp_path, sections, 10, 64, stream=console)
    recorder.record(1, {"train/loss": 1.0})
    with full_disk():
        recorder.record(2, {"train/loss": 2.0})
        recorder.record(3, {"train/loss": 3.0})
        recorder.first_batch(torch.zeros(2, 3, 4, 4))
    said = capsys.readouterr().err
    assert said.count(f"vitds: {tmp_path / 'metrics.jsonl'} cannot be written") == 1
    assert said.count("vitds: Csv cannot be written") == 1
    recorder.record(4, {"train/loss": 4.0})
    recorder.close()
    assert f"vitds: {tmp_path / 'metrics.jsonl'} can be written again; 2 lost" in capsys.readouterr().err
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 4]
    assert console.getvalue().count("loss") == 4


def test_a_console_on_a_full_disk(tmp_path, capsys):
    with open("/dev/full", "wb", buffering=0) as device:
        console = io.TextIOWrapper(device, write_through=True)
        recorder = Recorder(tmp_path, MonitorSections(), 10, 64, stream=console)
        recorder.say("hello")
        recorder.record(1, {"train/loss": 1.0})
        recorder.close()
    assert capsys.readouterr().err.count("the console cannot be written") == 1
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_other_errors_pass():
    with pytest.raises(ValueError, match="not the disk"), Expendable("x"):
        raise ValueError("not the disk")


def test_what_the_run_rests_on_is_not_lost_silently(tmp_path):
    with RunDirectory(tmp_path) as directory:
        with full_disk(), pytest.raises(OSError, match="too large"):
            directory.write_config({"train_batch_size": 8}, {})
        assert directory.stored_config() is None
        directory.add_skip(0, 16, loss=7.5)
        with full_disk(), pytest.raises(Stopped, match=r"skips.json cannot be written, so there is no rollback"):
            directory.add_skip(32, 48)
        assert directory.skips == [(0, 16)]
        assert not list(tmp_path.glob(".*.tmp"))


def test_skips_are_kept_in_order_with_their_reasons(tmp_path):
    with RunDirectory(tmp_path) as directory:
        assert directory.skips == []
        directory.add_skip(64, 96, loss=7.5, step=12)
        directory.add_skip(16, 32)
    assert RunDirectory(tmp_path).skips == [(64, 96), (16, 32)]
    first = json.loads((tmp_path / "skips.json").read_text())["skips"][0]
    assert (first["loss"], first["step"]) == (7.5, 12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1"),
        ("[]", "expected a JSON object"),
        ('{"skip": []}', "expected a list under skips"),
        ('{"skips": [[0, 8]]}', r"skips\[0\]: expected whole numbers"),
        ('{"skips": [{"start": 0, "end": 8}, {"start": 8}]}', r"skips\[1\]: expected"),
        ('{"skips": [{"start": 8, "end": 8}]}', r"0 ≤ start < end"),
        ('{"skips": [{"start": -8, "end": 8}]}', r"0 ≤ start < end"),
        ('{"skips": [{"start": 0.0, "end": 8}]}', "whole numbers"),
        ('{"skips": [{"start": false, "end": 8}]}', "whole numbers"),
        ('{"skips": [], "skips": []}', "given twice"),
    ],
)
def test_a_damaged_list_of_skips_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "skips.json").write_text(text)
    with RunDirectory(tmp_path) as directory:
        with pytest.raises(UserError, match=message) as refused:
            _ = directory.skips
        assert str(tmp_path / "skips.json") in str(refused.value)
        with pytest.raises(UserError, match=message):
            directory.add_skip(0, 8)
    assert (tmp_path / "skips.json").read_text() == text
