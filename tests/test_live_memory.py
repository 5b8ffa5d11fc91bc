"""Live bytes are counted: storages, not tensors, from when they are made until the last of their views is gone."""

from __future__ import annotations

import torch

from tests.live_memory import live_memory


def test_storages_are_counted_once_and_until_they_are_freed():
    before = torch.ones(1000)
    with live_memory() as seen:
        a = torch.ones(1000)
        view = a.view(10, 100)[3:]
        a.add_(1)
        before.mul_(2)
        assert before.view(10, 100) is not None
        assert seen.now == 4000
        b = a.to(torch.bfloat16)
        assert (seen.now, seen.peak) == (6000, 6000)
        del a
        assert seen.now == 6000
        del view
        assert (seen.now, seen.peak) == (2000, 6000)
        assert seen.where(0) == [(4000, 1, seen.where(0)[0][2]), (2000, 1, seen.where(0)[1][2])]
        assert "test_live_memory.py" in seen.where(0)[0][2]
        del b
    assert seen.now == 0


def test_a_backward_pass_is_seen():
    """fp32: two products of (8, 100), their gradients, and the weights' gradient that stays."""
    weight = torch.nn.Parameter(torch.ones(100, 100))
    with live_memory() as seen:
        seen.part("forward")
        loss = (torch.ones(8, 100) @ weight).square().sum()
        seen.part("backward")
        loss.backward()
        del loss
    assert weight.grad is not None
    assert seen.now == weight.grad.nbytes
    assert seen.peaks["backward"] >= 40_000 + 3200 > seen.peaks["forward"]
