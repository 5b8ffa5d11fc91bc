"""A step takes the memory of what it keeps and no whole-model copy beside it, and the host waits for the device once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launching import ranks
from tests.zero import spent
from tests.zero.cells import CELLS

FACTORS = 0.12
"""Bytes a parameter of row and column sums in this small model; 0.013 in G/14."""
ACTIVATIONS = 0.1


@pytest.fixture(scope="module", params=(1, 2), ids=lambda number: f"{number} ranks")
def launched(request, tmp_path_factory):
    """(number of ranks, {cell: what its third step spent})."""
    directory = tmp_path_factory.mktemp(f"spent{request.param}")
    done = ranks(request.param, Path(spent.__file__), directory)
    assert done.returncode == 0, done.stdout[-3000:]
    return request.param, json.loads((directory / "spent.json").read_text())


@pytest.mark.launch
@pytest.mark.parametrize("cell", spent.CASES)
def test_no_copy_of_the_model_is_made(launched, cell):
    """Weights, masters (4), momentum (2), gradients in the precision chosen; beside them one flat in fp32 and buckets of
    which DeepSpeed holds three or four at a time. One copy of the model in 16 bits, or of a rank's half of it, is more."""
    number, facts = launched
    fact, stage = facts[cell], CELLS[cell]["zero_optimization"]["stage"]
    weight = 4 if cell.startswith("fp32") else 2
    gradient = spent.CASES[cell]
    whole = weight + (gradient if stage == 1 else 0)  # at stage 1 each rank adds up all of its gradient
    cut = 6 + (gradient if stage > 1 else 0)
    if stage == 3:
        whole, cut = 0, cut + weight
    expected = whole + cut / number + FACTORS + ACTIVATIONS
    slack = spent.LIMIT * (4 + 4 * weight + (4 if "overlapping" in cell else 0)) / fact["parameters"]
    found = fact["peak"] / fact["parameters"]
    lines = [f"{size / fact['parameters']:.3f} {count} {place}" for size, count, place in fact["where"]]
    assert expected - 0.3 < found < expected + slack, "\n".join(
        [f"{found:.2f}, not {expected:.2f} + {slack:.2f}", *lines]
    )
    assert slack < 2 / number, "the test must see a 16-bit copy of this rank's part"


@pytest.mark.launch
@pytest.mark.parametrize("cell", spent.CASES)
def test_the_host_waits_once_a_step(launched, cell):
    """For the mean loss, the norm and whether it is finite, together; at stage 3 the norm is a tensor, on the host,
    which DeepSpeed and the engine read."""
    _, facts = launched
    on_the_host = {"_local_scalar_dense": 2} if "z3" in cell else {}
    assert facts[cell]["micro batch"] == [{}] * spent.MICRO_BATCHES
    assert facts[cell]["step"] == {"tolist": 1, **on_the_host}
