"""The run file's `optimizer` section, and foreign optimizers under ZeRO."""

from __future__ import annotations

import pytest
import torch

from vitds.errors import UserError
from vitds.optim import OPTIMIZERS, check_optimizer, constructor_params, resolve
from vitds.optim.elementwise import assert_elementwise

OTHERS = ["Adam", "AdamW", "Lion", "SGD", "RMSprop"]


def test_a_good_section_comes_back_as_it_was():
    given = {"type": "ModifiedAdafactor", "params": {"lr": 8e-4, "weight_decay": 0.03, "head_weight_decay": 3.0}}
    assert check_optimizer(given, OTHERS) == given
    assert constructor_params(given["params"]) == {"lr": 8e-4, "weight_decay": 0.03}
    assert check_optimizer({"type": "ModifiedAdafactor"}) == {"type": "ModifiedAdafactor", "params": {}}
    adamw = {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.99], "torch_adam": True}}
    assert check_optimizer(adamw, OTHERS) == adamw
    assert resolve("Lion", OTHERS) is None
    assert resolve("ModifiedAdafactor") is OPTIMIZERS["ModifiedAdafactor"]


def test_an_entry_of_a_plugin_is_found_and_checked(monkeypatch):
    class Plain(torch.optim.SGD):
        def __init__(self, params, lr=1.0, warp=1):
            super().__init__(params, lr=lr)

    monkeypatch.setitem(OPTIMIZERS, "Plain", Plain)
    assert resolve("Plain") is Plain
    with pytest.raises(UserError, match=r"wrap: Plain has no such parameter \(did you mean 'warp'\?\)"):
        check_optimizer({"type": "Plain", "params": {"wrap": 2}})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"type": "Adafactor"}, r"torch.optim.Adafactor.*use 'ModifiedAdafactor'"),
        ({"type": "adafactor"}, r"use 'ModifiedAdafactor'"),
        ({"type": "ModifedAdafactor"}, r"did you mean 'ModifiedAdafactor'.*ours: .*torch's: Adam, AdamW"),
        ({"type": "AdmW"}, r"did you mean 'AdamW'"),
        ({}, r"optimizer.type: missing"),
        ({"type": "AdamW", "parms": {}}, r"optimizer.parms: unknown key \(did you mean 'params'\?\)"),
        ({"type": "SGD", "params": {"learning_rate": 1}}, r"learning_rate: SGD has no such parameter"),
        ({"type": "ModifiedAdafactor", "params": {"beta_1": 0.9}}, r"beta_1: .*did you mean 'beta1'"),
        ({"type": "ModifiedAdafactor", "params": {"lr": -1}}, r"optimizer.params.lr: -1 is not a number ≥ 0"),
        ({"type": "AdamW", "params": {"lr": "1e-3"}}, r"optimizer.params.lr: '1e-3' is not a number"),
        ({"type": "ModifiedAdafactor", "params": {"head_weight_decay": -3}}, r"head_weight_decay: -3 is not"),
        ({"type": "ModifiedAdafactor", "params": {"beta1": 1.0}}, r"beta1: 1.0 is not a number in \[0, 1\)"),
        ({"type": "ModifiedAdafactor", "params": {"eps": 0}}, r"eps: 0 is not"),
        ({"type": "ModifiedAdafactor", "params": {"clipping_threshold": 0}}, r"clipping_threshold: 0 is not"),
        ({"type": "HalfPrecisionMomentumAdam", "params": {"betas": [0.9]}}, r"betas: \[0.9\] is not a pair"),
        ({"type": "HalfPrecisionMomentumAdam", "params": {"betas": [0.9, 1.5]}}, r"betas\[1\]: 1.5 is not"),
        ({"type": "HalfPrecisionMomentumSGD", "params": {"momentum": True}}, r"momentum: True is not"),
        ({"type": "ModifiedAdafactor", "params": {"lr": float("nan")}}, r"lr: nan is not"),
    ],
    ids=str,
)
def test_mistakes_are_named(section, message):
    with pytest.raises(UserError, match=message):
        check_optimizer(section, OTHERS)


class LayerwiseRate(torch.optim.SGD):
    """A trust ratio as LAMB's and LARS's: each tensor's step depends on its norm."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad * (p.data.norm() / p.grad.norm()), alpha=-group["lr"])


@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop", "Adagrad", "NAdam"])
def test_elementwise_optimizers_pass(name):
    assert_elementwise(getattr(torch.optim, name), {"lr": 1e-3})


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (torch.optim.Adafactor, "keeps 'row_var' of shape|is not elementwise"),
        (LayerwiseRate, "LayerwiseRate is not elementwise: under ZeRO it sees flat pieces"),
        (torch.optim.LBFGS, "LBFGS cannot step a parameter of shape"),
    ],
)
def test_others_are_caught(cls, message):
    with pytest.raises(UserError, match=message):
        assert_elementwise(cls, {"lr": 1e-3})
