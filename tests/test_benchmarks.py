"""The benchmarks' arithmetic, and that `step` runs from its command to its table; how fast anything is, is not tested."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.runner import Candidate, Column, compare, report, turn


def scripted(*seconds: float):
    """A turn that takes what it is told, one number after the other."""
    remaining = iter(seconds)
    return lambda: {"seconds": next(remaining)}


def test_medians_and_ratios_are_taken_round_by_round():
    slow, fast = scripted(99, 4, 8, 2), scripted(99, 2, 2, 2)
    table = compare("t", [Candidate("slow", slow), Candidate("fast", fast, baseline="slow")], rounds=3, warmup=1)
    assert table["slow"].figures["seconds"] == 4
    assert table["slow"].ratio is None
    fast_row = table["fast"]
    assert (fast_row.ratio, fast_row.least, fast_row.most) == (2, 1, 4)  # of 2, 4 and 1, not of the medians' quotient
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
