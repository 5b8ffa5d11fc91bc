"""Every optimizer of torch's that is let through goes on from its saved state as if it had not been interrupted."""

from __future__ import annotations

import pytest
import torch

from vitds.errors import UserError
from vitds.layout import Flat, Fragment
from vitds.optim.elementwise import assert_elementwise
from vitds.zero.engine import OWN_NAMES, other_optimizer_names
from vitds.zero.foreign import ForeignState

SETTINGS = {"SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}}
NAMES = [name for name in other_optimizer_names() if name not in OWN_NAMES] + ["AdamW"]


def run(name: str, steps: list[int], weights: torch.Tensor, shards=None, scalars=None):
    flat = torch.nn.Parameter(weights.clone())
    optimizer = getattr(torch.optim, name)([flat], **SETTINGS.get(name, {"lr": 0.01}))
    parts = (Fragment("a", (2, 3), (2, 3), 0, 6, 0), Fragment("b", (4,), (4,), 1, 3, 7))
    foreign = ForeignState(optimizer, [Flat(flat, parts)])
    if shards is not None:
        for mine, saved in zip(foreign.shards(to_fill=True), shards, strict=True):
            mine.data.copy_(saved)
        foreign.restore_scalars(scalars)
    for step in steps:
        flat.grad = torch.randn(10, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    return flat.detach(), foreign


@pytest.mark.parametrize("name", NAMES)
def test_state_is_saved_and_put_back(name):
    try:
        assert_elementwise(getattr(torch.optim, name), SETTINGS.get(name, {"lr": 0.01}))
    except UserError:
        pytest.fail(f"{name} is offered and refused")
    weights = torch.randn(10, generator=torch.Generator().manual_seed(99))
    plain = torch.nn.Parameter(weights.clone())
    untouched = getattr(torch.optim, name)([plain], **SETTINGS.get(name, {"lr": 0.01}))
    for step in range(6):
        plain.grad = torch.randn(10, generator=torch.Generator().manual_seed(step))
        untouched.step()
    unbroken, _ = run(name, list(range(6)), weights)
    assert torch.equal(unbroken, plain.detach()), "looking at the state changed what the optimizer does"
    half, foreign = run(name, [0, 1, 2], weights)
    saved = [shard.data.clone() for shard in foreign.shards(to_fill=False)]
    resumed, _ = run(name, [3, 4, 5], half, saved, foreign.scalars())
    held = [0, 1, 2, 3, 4, 5, 7, 8, 9]  # element 6 is padding, which nobody saves
    assert torch.equal(resumed[held], unbroken[held])
