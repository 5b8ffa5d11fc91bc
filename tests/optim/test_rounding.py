"""bf16 masters: random bits that depend on the element alone, and rounding that is right on average."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from vitds.errors import UserError
from vitds.layout import Flat, Fragment
from vitds.optim import OPTIMIZERS
from vitds.optim.rounding import name_key, philox, stochastically, store, stream_of

PUBLISHED = [  # Random123's known answers: rounds, counter, key, result
    (7, (0, 0), 0, (0x257A3673, 0xCD26BE2A)),
    (7, (0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFF, (0xAB302C4D, 0x3DC9D239)),
    (7, (0x243F6A88, 0x85A308D3), 0x13198A2E, (0xBEDBBE6B, 0xE4C770B3)),
    (10, (0x243F6A88, 0x85A308D3), 0x13198A2E, (0xDD7CE038, 0xF62A4C12)),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "wanted"), PUBLISHED)
def test_the_generator_gives_the_published_words(rounds, counter, key, wanted):
    low, high = (torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in philox(low, high, key, rounds)) == wanted


def rounded(values: torch.Tensor, seed: int = 0, step: int = 1, name: str = "w", first: int = 0) -> torch.Tensor:
    return stochastically(values, first, stream_of(name_key(seed, name), step))


def test_it_is_right_on_average_and_only_ever_a_neighbour():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200, generator=generator) * torch.logspace(-30, 30, 200)
    lower = (values.view(torch.int32) & -0x10000).view(torch.float32)  # towards zero
    upper = ((values.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    wanted = ((values - lower) / (upper - lower)).double()
    runs = 4000
    ups = torch.zeros(200, dtype=torch.float64)
    for run in range(runs):
        found = rounded(values, seed=run % 50, step=run // 50).float()
        assert ((found == lower) | (found == upper)).all()
        ups += found == upper
    off = (ups / runs - wanted) / (wanted * (1 - wanted) / runs).sqrt()
    assert off.abs().max() < 4.5
    assert abs(float(off.square().mean()) - 1) < 0.35, "as independent draws scatter"


def test_representable_infinite_and_missing_numbers_stay():
    values = torch.cat([torch.randn(1000, generator=torch.Generator().manual_seed(1)).bfloat16().float(),
                        torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, 3e38])])  # fmt: skip
    values = torch.cat([values, torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)])
    for step in range(20):
        found = rounded(values, step=step).float()
        assert torch.equal(found[:1004], values[:1004])
        assert found[[1004, -3, -2, -1]].isnan().all(), "a NaN whose bits wrap is still one"


def test_bits_differ_between_seeds_updates_names_and_elements_and_are_the_same_again():
    values = torch.full((4096,), 1 + 2**-9)
    first = rounded(values)
    assert torch.equal(first, rounded(values))
    others = [
        rounded(values, seed=1), rounded(values, step=2), rounded(values, name="v"), rounded(values, first=4096),
        rounded(values, first=2**32), rounded(values, step=1 + 2**31),
    ]  # fmt: skip
    for other in others:
        assert 0.4 < float((first != other).float().mean()) / 0.375 < 1.6, "as often as two independent draws"


@pytest.mark.parametrize("cuts", [(), (1, 2, 700), (333, 334)])
def test_neither_the_cut_nor_the_place_in_a_flat_changes_a_bit(cuts):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    whole = rounded(values, seed=3, step=5, name="p")
    pieces = []
    for start, end in zip((0, *cuts), (*cuts, 1000), strict=True):
        offset = start % 7 + 2
        tensor = torch.zeros(offset + end - start + 1, dtype=torch.bfloat16)
        flat = Flat(tensor, (Fragment("p", (10, 100), (10, 100), start, end - start, offset),))
        padded = torch.full((len(tensor),), 1 + 2**-10)
        padded[offset:-1] = values[start:end]
        for begin in range(0, len(tensor), 13):  # as the torch path walks a flat
            store(flat, 3, 5, begin, tensor[begin : begin + 13], padded[begin : begin + 13])
        assert tensor[0] == tensor[-1] == 1, "padding rounds to nearest"
        pieces.append(tensor[offset:-1])
    assert torch.equal(torch.cat(pieces), whole)


def train(name: str, steps: int, dtype: torch.dtype, **params: Any) -> tuple[Any, torch.nn.Parameter]:
    p = torch.nn.Parameter(torch.ones(64, 48, dtype=dtype))
    optimizer = OPTIMIZERS[name]([{"params": [p], "names": ["w"]}], **params)
    move(optimizer, p, steps)
    return optimizer, p


def move(optimizer: Any, p: torch.nn.Parameter, steps: int) -> None:
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_far_below_the_spacing_arrive(name):
    """Each step moves by a hundredth of bf16's spacing below 1: to the nearest, none would ever arrive."""
    lr = {"HalfPrecisionMomentumSGD": 4e-6}.get(name, 4e-5)
    _, exact = train(name, 200, torch.float32, lr=lr)
    _, masters = train(name, 200, torch.bfloat16, lr=lr)
    moved, wanted = float((1 - masters.detach().float()).mean()), float((1 - exact.detach()).mean())
    assert wanted < 0.05
    assert moved == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bf16_masters_resume_bit_for_bit_and_keep_what_must_be_fp32(name):
    params = {"lr": 1e-3, "weight_decay": 0.1, "rounding_seed": 7}
    optimizer, p = train(name, 3, torch.bfloat16, **params)
    resumed, q = train(name, 0, torch.bfloat16, **params)
    q.data.copy_(p.data)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for key, value in optimizer.state[p].items():
        if torch.is_tensor(value):
            assert value.dtype == (torch.bfloat16 if key == "exp_avg" else torch.float32)
            assert torch.equal(value, resumed.state[q][key])
            assert resumed.state[q][key].dtype == value.dtype
    move(optimizer, p, 3)
    move(resumed, q, 3)
    assert torch.equal(p, q)
    other, r = train(name, 6, torch.bfloat16, **(params | {"rounding_seed": 8}))
    assert other.updates == 6
    assert not torch.equal(p, r)


@pytest.mark.parametrize("seed", [-1, 0.5, True, "1"])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(UserError, match="optimizer.params.rounding_seed"):
        train("ModifiedAdafactor", 0, torch.float32, rounding_seed=seed)
