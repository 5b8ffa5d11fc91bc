"""A batch that is dropped leaves nothing behind, nor does its replay, in every cell; and the replay names the right place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launching import ranks
from tests.zero import replayed

FC1 = "blocks.1.mlp.fc1"
CELLS = list(replayed.tried())


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> list[dict[str, dict]]:
    directory = tmp_path_factory.mktemp("replayed")
    done = ranks(2, Path(replayed.__file__), directory, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:]
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_every_cell_ran(facts):
    assert list(facts[0]) == list(facts[1]) == CELLS


@pytest.mark.parametrize("cell", CELLS)
def test_dropped_and_replayed_batches_leave_the_run_of_one_that_never_saw_them(facts, cell):
    for rank in range(2):
        found = facts[rank][cell]
        assert found["dropped"] == [True, False, True], "a finite batch, not updated, nothing found in its replay"
        assert found["losses_differ"] == [], f"rank {rank}: losses of the batches that came after"
        assert found["differing"] == [], f"rank {rank}: masters, state and weights"
        expected, counters = found["counters"]
        assert counters == expected
        assert expected["optimizer"] in ({"updates": 5}, {"state": {"step": 5.0}, "group": {}})


@pytest.mark.parametrize("cell", CELLS)
def test_the_first_bad_place_is_named(facts, cell):
    for rank in range(2):
        found = facts[rank][cell]
        assert found["images"] == [
            False,
            False,
            {"what": "images", "name": "", "rank": 1, "micro_batch": 1, "positions": [30, 31], "ranks": [1]},
        ]
        last = {"rank": 0, "micro_batch": 0, "positions": [56, 57], "ranks": [0, 1]}
        assert found["output"] == {"what": "output", "name": FC1, **last}
        assert found["weight"] == {"what": "weight", "name": f"{FC1}.weight", **last}


@pytest.mark.parametrize("cell", CELLS)
def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_named(facts, cell):
    for rank in range(2):
        finite, updated, said, [[kind, event]] = facts[rank][cell]["gradient"]
        assert finite
        assert not updated
        assert kind == "not finite"
        keys = event.pop("images")
        name = event.pop("name")
        assert name in ("head.bias", "head.weight")
        assert event == {
            "step": 4, "found": True, "what": "gradient", "rank": 0, "micro_batch": 0, "positions": [40, 41], "ranks": [0],
        }  # fmt: skip
        assert said == (
            f"the gradient of {name} is the first that is not finite, on rank 0, micro batch 0 of images {', '.join(keys)}"
        )
        assert all(key.startswith("digits/") for key in keys)
