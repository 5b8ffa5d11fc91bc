"""The benchmarks' arithmetic, and that `step` runs from its command to its table; how fast anything is, is not tested."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from benchmarks.runner import Candidate, Column, compare, report, turn
from tests.launching import ROOT, environment
from vitds.models import ModelSection, build_config, flops_per_image


def scripted(*seconds: float):
    """A turn that takes what it is told, one number after the other."""
    remaining = iter(seconds)
    return lambda: {"seconds": next(remaining)}


def test_medians_and_ratios_are_taken_round_by_round():
    slow, fast = scripted(99, 8, 4, 2), scripted(99, 2, 2, 2)
    table = compare("t", [Candidate("slow", slow), Candidate("fast", fast, baseline="slow")], rounds=3, warmup=1)
    assert table["slow"].figures["seconds"] == 4
    assert table["slow"].ratio is None
    fast_row = table["fast"]
    assert (fast_row.ratio, fast_row.least, fast_row.most) == (2, 1, 4)  # of 4, 2 and 1, not of the medians' quotient
    assert "×2.00 (1.00 to 4.00) of slow" in table.text()


def test_more_is_faster_of_every_figure_but_seconds():
    given = {"ours": {"images/s": 300.0}, "theirs": {"images/s": 200.0}}
    candidates = [Candidate(name, lambda found=found: found, baseline="theirs") for name, found in given.items()]
    table = compare("t", candidates, rounds=1, by="images/s", columns=[Column("images/s", "images/s", ".0f")])
    assert table["ours"].ratio == 1.5
    assert table["theirs"].ratio == 1


def test_amounts_become_rates():
    figures = turn(Candidate("c", scripted(0.5), amounts={"images": 64}), torch.device("cpu"))
    assert figures == {"seconds": 0.5, "images/s": 128}


def test_one_that_fails_is_a_row_with_its_reason_and_the_others_go_on(tmp_path):
    def broken():
        raise MemoryError("no room\nfor more")

    def later(calls=iter(range(9))):  # noqa: B008 (its state)
        if next(calls) == 2:
            raise ImportError("timm")
        return {"seconds": 1.0}

    order = []

    def fine():
        order.append("fine")
        return {"seconds": 2.0}

    candidates = [Candidate("broken", broken), Candidate("fine", fine, baseline="broken"), Candidate("later", later)]
    table = compare("t", candidates, rounds=3, warmup=0)
    assert table["broken"].error == "MemoryError: no room"
    assert table["fine"].figures["seconds"] == 2
    assert table["fine"].ratio is None
    assert len(order) == 3
    assert (len(table["later"].rounds), table["later"].error) == (2, "ImportError: timm")
    report([table], tmp_path / "made" / "table.json")
    written = json.loads((tmp_path / "made" / "table.json").read_text())
    assert {"date", "command", "commit", "device", "versions"} <= set(written)
    assert [row["name"] for row in written["tables"][0]["rows"]] == ["broken", "fine", "later"]
    assert written["tables"][0]["rows"][1]["rounds"] == [{"seconds": 2.0}] * 3


def test_turns_go_round():
    order = []
    candidates = [Candidate(name, lambda name=name: order.append(name)) for name in "abc"]
    compare("t", candidates, rounds=3, warmup=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"


def test_two_of_one_name_are_a_mistake():
    with pytest.raises(AssertionError, match="one name"):
        compare("t", [Candidate("a", dict), Candidate("a", dict)])


@pytest.mark.launch
def test_step_measures_a_run_file_beside_a_peer_and_names_what_cannot_run(tmp_path):
    small = {
        "train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "communication_data_type": "fp32",
        "vitds": {
            "model": {"width": 16, "depth": 2, "mlp_dim": 32, "num_heads": 2, "patch_size": 4, "num_classes": 10, "image_size": 8},
            "train": {"peak_tflops": 0.001},
        },
    }  # fmt: skip
    (tmp_path / "small.json").write_text(json.dumps(small))
    command = [
        sys.executable, "benchmarks/step.py", "--config", str(tmp_path / "small.json"), "--trainees", "ours", "torch",
        "--sweep", "checkpointing=none,nonsense", "--rounds", "2", "--warmup", "1", "--steps", "2", "--accumulation", "2",
        "--no-apart", "--json", str(tmp_path / "step.json"),
    ]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=ROOT, env=environment(), timeout=300, **pipes)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "images/s" in done.stdout
    (table,) = json.loads((tmp_path / "step.json").read_text())["tables"]
    rows = {row["name"]: row for row in table["rows"]}
    assert rows.keys() == {"ours checkpointing=none", "ours checkpointing=nonsense", "torch"}
    broken = rows.pop("ours checkpointing=nonsense")
    assert "'nonsense'" in broken["error"] and "selective" in broken["error"]
    for row in rows.values():
        figures = row["figures"]
        assert row["error"] is None and len(row["rounds"]) == 2
        assert figures["micro"] == 2 and figures["memory"] > 0 and figures["loss"] > 0
        assert figures["images/s"] == pytest.approx(4 / figures["seconds"], rel=0.5)  # medians of each
        flops = 3 * flops_per_image(build_config(ModelSection(variant=None, **small["vitds"]["model"])))
        assert row["rounds"][0]["mfu"] == pytest.approx(row["rounds"][0]["images/s"] * flops / 1e9)
    assert rows["ours checkpointing=none"]["ratio"] > 0


def test_a_search_whose_time_ends_keeps_what_it_has_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    step = importlib.import_module("step")

    class Child:
        def __init__(self, words, ranks, timeout):
            self.kind = words[1]

        def ask(self, micro, warmup, steps):
            if (self.kind, micro) == ("torch", 4):
                raise KeyboardInterrupt
            return {"images/s": 100.0 + micro, "micro": micro, "seconds": 1.0}

        def end(self):
            pass

    monkeypatch.setattr(step, "Child", Child)
    words = [
        "--config",
        "ds_configs/digits.json",
        "--trainees",
        "ours",
        "torch",
        "torch-fp32",
        "--search",
        "2:8",
        "--rounds",
        "0",
    ]
    monkeypatch.setattr(sys, "argv", ["step.py", *words, "--json", str(tmp_path / "step.json")])
    step.main()
    search, compared = json.loads((tmp_path / "step.json").read_text())["tables"]
    tried = [f"ours, micro batch {size}" for size in (2, 4, 8)]
    assert [row["name"] for row in search["rows"]] == [*tried, "torch, micro batch 2", "torch-fp32"]
    rows = {row["name"]: row for row in compared["rows"]}
    assert (rows["ours"]["figures"]["micro"], rows["torch"]["figures"]["micro"]) == (8, 2)
    assert rows["ours"]["ratio"] == pytest.approx(108 / 102)
    assert "no time was left" in rows["torch-fp32"]["error"]


def test_a_gpu_is_lent_to_as_many_settings_as_fit(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    room = importlib.import_module("memory").Room(100, at_once=3)
    inside, most, lock = [], [], threading.Lock()

    def work(size):
        with lock:
            inside.append(size)
            most.append((len(inside), sum(inside)))
        time.sleep(0.05)
        with lock:
            inside.remove(size)
        return {"size": size}

    sizes = [10, 10, 10, 10, 50, 60, 300]
    with ThreadPoolExecutor(len(sizes)) as pool:
        done = [pool.submit(room.within, room.queue(size), partial(work, size)) for size in sizes]
        assert [one.result(10)["size"] for one in done] == sizes
        assert max(number for number, _ in most) == 3
        assert all(number == 1 or taken <= 91 for number, taken in most), most
        room.close()
        with pytest.raises(Exception, match="the time was over"):
            room.within(room.queue(1), dict)
