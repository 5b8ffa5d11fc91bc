"""Optimizers by name, and the checks on the run file's `optimizer` section.

`OPTIMIZERS` is a plain dict from the name in `optimizer.type` to a class built as `cls(param_groups, **params)`; a
module named in `vitds.plugins` may add its own. A class that is not elementwise derives from `LayoutOptimizer`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vitds.errors import UserError, nearest
from vitds.optim.adafactor import ModifiedAdafactor
from vitds.optim.adam import HalfPrecisionMomentumAdam
from vitds.optim.base import LayoutOptimizer, check_range
from vitds.optim.sgd import HalfPrecisionMomentumSGD
from vitds.sections import key, parse

__all__ = [
    "OPTIMIZERS", "HalfPrecisionMomentumAdam", "HalfPrecisionMomentumSGD", "LayoutOptimizer", "ModifiedAdafactor",
    "OptimizerSection", "check_optimizer", "constructor_params", "resolve",
]  # fmt: skip

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "HalfPrecisionMomentumAdam": HalfPrecisionMomentumAdam,
    "ModifiedAdafactor": ModifiedAdafactor,
    "HalfPrecisionMomentumSGD": HalfPrecisionMomentumSGD,
}

GROUP_PARAMS = ("head_weight_decay",)
"""Keys of `optimizer.params` that set parameter groups (vitds.optim.groups) and reach no class."""

DEEPSPEED_PARAMS = ("torch_adam", "adam_w_mode", "bias_correction", "set_grad_none", "fp32_optimizer_states")
"""Keys that DeepSpeed's own classes take beside those of torch's classes of the same name."""


@dataclass(frozen=True)
class OptimizerSection:
    """`optimizer` of the run file."""

    type: str = key(doc="Name of the optimizer: one of vitds.optim.OPTIMIZERS, DeepSpeed's or torch's.")
    params: dict[str, Any] = key({}, "lr, weight_decay, head_weight_decay (classifier's kernel), the class's own.")


def resolve(type_name: str, also_allowed: Sequence[str] = ()) -> type[torch.optim.Optimizer] | None:
    """The class of `optimizer.type`; None when it is one of `also_allowed`, which others build (DeepSpeed's, torch's).

    Raises:
        UserError: an unknown name; a bare "Adafactor", which DeepSpeed would take for torch's.
    """
    if type_name in OPTIMIZERS:
        return OPTIMIZERS[type_name]
    if type_name.lower() == "adafactor":
        raise UserError(
            f"optimizer.type: {type_name!r} would be torch.optim.Adafactor: under ZeRO it sees flat pieces, never "
            "factors them and saves no memory; use 'ModifiedAdafactor'"
        )
    if type_name in also_allowed:
        return None
    raise UserError(
        f"optimizer.type: {type_name!r} is not known{nearest(type_name, [*OPTIMIZERS, *also_allowed])}; "
        f"ours: {', '.join(OPTIMIZERS)}; DeepSpeed's and torch's: {', '.join(also_allowed) or 'none'}"
    )


def check_optimizer(given: Any, also_allowed: Sequence[str] = ()) -> dict[str, Any]:
    """The run file's `optimizer` section, checked: {"type": …, "params": …}.

    Args:
        given: the parsed JSON.
        also_allowed: names besides those of OPTIMIZERS.

    Raises:
        UserError: an unknown type or parameter, a parameter of the wrong type or out of range.
    """
    section = parse(OptimizerSection, given, "optimizer")
    cls = resolve(section.type, also_allowed)
    extra: tuple[str, ...] = GROUP_PARAMS
    if cls is None:
        cls, extra = getattr(torch.optim, section.type, None), (*GROUP_PARAMS, *DEEPSPEED_PARAMS)
    if cls is not None:
        _check_names(cls, section.params, extra)
    for name in ("lr", "weight_decay", "head_weight_decay"):
        if section.params.get(name) is not None:
            check_range(name, section.params[name], 0)
    if section.type in OPTIMIZERS:
        _check_by_trial(OPTIMIZERS[section.type], constructor_params(section.params))
    return {"type": section.type, "params": dict(section.params)}


def constructor_params(params: dict[str, Any]) -> dict[str, Any]:
    """`optimizer.params` without the keys that only set parameter groups: what the class itself is given."""
    return {name: value for name, value in params.items() if name not in GROUP_PARAMS}


def _check_names(cls: type, params: dict[str, Any], extra: Sequence[str]) -> None:
    signature = list(inspect.signature(cls).parameters.values())[1:]  # the first takes the parameter groups
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature):
        return
    known = [*(parameter.name for parameter in signature), *extra]
    for name in params:
        if name not in known:
            raise UserError(
                f"optimizer.params.{name}: {cls.__name__} has no such parameter{nearest(name, known)}; "
                f"allowed: {', '.join(known)}"
            )


def _check_by_trial(cls: Any, params: dict[str, Any]) -> None:
    """Builds the optimizer once for a parameter of one element: each class knows its own ranges."""
    try:
        cls([{"params": [torch.nn.Parameter(torch.zeros(1))]}], **params)
    except UserError:
        raise
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"optimizer.params: {cls.__name__} cannot be built with {params}: {error}") from error
