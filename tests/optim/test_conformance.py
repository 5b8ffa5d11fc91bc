"""What every entry of OPTIMIZERS must do, whoever wrote it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.optim.cases import VIEWS, build, fill, gradients, groups_of, initial, param_groups
from vitds.layout import Flat, Shard
from vitds.optim import OPTIMIZERS, LayoutOptimizer

LR = 1e-2
pytestmark = pytest.mark.parametrize("name", OPTIMIZERS)
Parameters = dict[str, torch.nn.Parameter]


def make(name: str, seed: int = 0) -> tuple[Any, Parameters]:
    parameters = {n: torch.nn.Parameter(value) for n, value in initial(seed).items()}
    group = {"params": [*parameters.values()], "names": [*parameters], "views": [VIEWS.get(n) for n in parameters]}
    return OPTIMIZERS[name]([group], lr=LR, weight_decay=0.1), parameters


def train(optimizer: Any, parameters: Parameters, grads: list[dict[str, torch.Tensor]]) -> None:
    for step in grads:
        for n, p in parameters.items():
            p.grad = step[n].clone()
        optimizer.step()


def by_name(shards: list[Shard]) -> dict[str, Shard]:
    named = {shard.name: shard for shard in shards}
    assert len(named) == len(shards)
    return named


def test_descends_a_quadratic(name):
    target = torch.randn(40, 36, generator=torch.Generator().manual_seed(0))
    p = torch.nn.Parameter(torch.zeros(40, 36))
    optimizer = OPTIMIZERS[name]([p], lr=0.1)
    losses = []
    for step in range(100):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 100)
        losses.append(optimizer.step(lambda: loss_of(p, target)))
    assert losses[0] == pytest.approx(float(target.square().mean()))
    assert losses[-1] < 0.02 * losses[0]


def loss_of(p: torch.nn.Parameter, target: torch.Tensor) -> float:
    p.grad = None
    loss = 0.5 * (p - target).square().sum()
    loss.backward()
    return float(loss.detach()) * 2 / target.numel()


def test_resumed_from_its_state_dict_it_goes_on_bit_for_bit(name):
    grads = gradients(6)
    optimizer, parameters = make(name)
    train(optimizer, parameters, grads[:3])
    saved = copy.deepcopy(optimizer.state_dict())
    resumed, copies = make(name, seed=5)
    for n, p in parameters.items():
        copies[n].data.copy_(p.data)
    resumed.load_state_dict(saved)
    assert resumed.updates == 3
    assert all(s["exp_avg"].dtype == torch.bfloat16 for s in resumed.state.values()), "torch casts what it loads"
    assert all(torch.equal(a, b) for a, b in zip(flat_states(optimizer), flat_states(resumed), strict=True))
    train(optimizer, parameters, grads[3:])
    train(resumed, copies, grads[3:])
    assert all(torch.equal(parameters[n], copies[n]) for n in parameters)


def flat_states(optimizer: Any) -> list[torch.Tensor]:
    return [tensor for state in optimizer.state.values() for tensor in state.values() if torch.is_tensor(tensor)]


def test_resumed_from_its_shards_it_goes_on_bit_for_bit(name):
    grads = gradients(4)
    optimizer, parameters = make(name)
    train(optimizer, parameters, grads[:2])
    resumed, copies = make(name, seed=5)
    for n, p in parameters.items():
        copies[n].data.copy_(p.data)
    wanted, fresh = by_name(optimizer.state_shards()), by_name(resumed.state_shards())
    assert wanted.keys() == fresh.keys()
    for shard_name, shard in fresh.items():
        assert not shard.data.any(), "state starts at zero"
        shard.data.copy_(wanted[shard_name].data)
    resumed.updates = optimizer.updates
    train(optimizer, parameters, grads[2:])
    train(resumed, copies, grads[2:])
    assert all(torch.equal(parameters[n], copies[n]) for n in parameters)


def test_shards_name_all_state_once_in_its_own_dtype(name):
    optimizer, parameters = make(name)
    train(optimizer, parameters, gradients(1))
    shards = by_name(optimizer.state_shards())
    for n, p in parameters.items():
        assert shards[f"{n}.exp_avg"].shape == tuple(p.shape)
        assert shards[f"{n}.exp_avg"].data.dtype == torch.bfloat16
    for shard in shards.values():
        assert shard.start == 0
        assert shard.replicated, "a parameter that nobody cuts is the same on every rank"
        assert shard.data.numel() == shard.total
        assert shard.name.endswith("exp_avg") or shard.data.dtype == torch.float32
        assert shard.data.any(), f"{shard.name} is not the live state"
    held = sum(shard.data.nbytes for shard in shards.values())
    assert optimizer.state_bytes() == held == sum(t.nbytes for t in flat_states(optimizer))
    assert all(t.dim() == 1 or t.shape in {p.shape for p in parameters.values()} for t in flat_states(optimizer))
    if name == "ModifiedAdafactor":
        assert shards["qkv.weight.exp_avg_sq_row"].shape == (3, 2, 35)  # without the width, its largest axis
        assert shards["qkv.weight.exp_avg_sq_col"].shape == (3, 2, 70)
        assert shards["head.weight.exp_avg_sq_row"].shape == (70,)
        assert shards["head.weight.exp_avg_sq_col"].shape == (101,)
        assert shards["patch16.exp_avg_sq"].shape == (36, 3, 16, 16)
        assert "qkv.weight.exp_avg_sq" not in shards


def test_extra_keys_of_groups_and_tensors_without_gradient_are_left_alone(name):
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = OPTIMIZERS[name]([{"params": [a, b], "name": "x", "lr_mult": 0.5}], lr=LR, weight_decay=0.5)
    a.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(b.detach(), torch.ones(3))
    assert not torch.equal(a.detach(), torch.ones(3))
    assert optimizer.param_groups[0]["lr_mult"] == 0.5
    optimizer.param_groups[0]["params"] = []  # as ZeRO-3 leaves it between sub-groups
    optimizer.step()
    assert optimizer.updates == 1


def test_non_contiguous_and_half_precision_gradients_count(name):
    """A convolution's gradient may be channels-last; at ZeRO-0 it reaches the optimizer as it is."""
    a, b = (torch.nn.Parameter(torch.zeros(8, 40, 36)) for _ in range(2))
    grad = torch.randn(8, 40, 36, generator=torch.Generator().manual_seed(0)).bfloat16()
    a.grad = grad.float()
    b.grad = grad.float().permute(2, 0, 1).contiguous().permute(1, 2, 0)
    OPTIMIZERS[name]([a], lr=LR).step()
    optimizer = OPTIMIZERS[name]([b], lr=LR)
    optimizer.step()
    assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "random"])
def test_one_rank_with_everything_in_flats_moves_like_whole_parameters(name, layout):
    """Concatenation, order and padding change nothing; several calls of step() per update neither."""
    grads = gradients(3)
    whole, parameters = make(name)
    train(whole, parameters, grads)
    flats = [build(ranks, 0, initial()) for ranks in groups_of(1, layout, seed=3)]
    optimizer = OPTIMIZERS[name](param_groups(flats), lr=LR, weight_decay=0.1)
    assert isinstance(optimizer, LayoutOptimizer)
    optimizer.bind(flats)
    groups = optimizer.param_groups
    for step in grads:
        for i, flat in enumerate(flats):
            flat.tensor.grad = torch.full_like(flat.tensor, float("nan"))  # padding may hold anything
            fill(flat, flat.tensor.grad, step)
            optimizer.param_groups = [groups[i]]  # as ZeRO-1 and 2 do
            optimizer.step()
            flat.tensor.grad = None
    optimizer.param_groups = groups
    assert optimizer.updates == 3
    for n, p in parameters.items():
        value = values_of(flats, n)
        assert torch.allclose(value, p.detach().view(-1), rtol=0, atol=2e-6 * LR), n
    shards = by_name(optimizer.state_shards())
    for shard in whole.state_shards():
        assert shards[shard.name].shape == shard.shape
        assert torch.allclose(shards[shard.name].data.float(), shard.data.float(), rtol=1e-2, atol=1e-12), shard.name


def values_of(flats: list[Flat], name: str) -> torch.Tensor:
    return torch.cat([f.of(flat.tensor) for flat in flats for f in flat.fragments if f.name == name])


def test_bind_refuses_to_lose_state(name):
    optimizer, parameters = make(name)
    train(optimizer, parameters, gradients(1))
    with pytest.raises(AssertionError, match="would drop the state"):
        optimizer.bind([])
