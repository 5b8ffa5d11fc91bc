"""Initial values, kept beside the parameters they are for.

A module that owns parameters declares each with its shape and the rule that fills it. From this table come
`reset_parameters()`, transformers' initialisation of missing weights, and `initial_tensor`, which needs no live
parameter at all (a parameter may be on the meta device, in 16 bits, or emptied by ZeRO-3).
Rules are those of the authors' released code ("Scaling Vision Transformers", arXiv 2106.04560).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

Fill = Callable[[torch.Tensor, torch.Generator | None], None]


def zeros(tensor: torch.Tensor, generator: torch.Generator | None) -> None:
    """All 0."""
    nn.init.zeros_(tensor)


def ones(tensor: torch.Tensor, generator: torch.Generator | None) -> None:
    """All 1."""
    nn.init.ones_(tensor)


def _normal(tensor: torch.Tensor, generator: torch.Generator | None, *, std: float) -> None:
    nn.init.normal_(tensor, std=std, generator=generator)


def _uniform(tensor: torch.Tensor, generator: torch.Generator | None, *, bound: float) -> None:
    nn.init.uniform_(tensor, -bound, bound, generator=generator)


def _truncated(tensor: torch.Tensor, generator: torch.Generator | None, *, std: float) -> None:
    nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std, generator=generator)


def normal(std: float) -> Fill:
    """Normal around 0, not truncated."""
    return partial(_normal, std=std)


def xavier_uniform(fan_in: int, fan_out: int) -> Fill:
    """Uniform within ±√(6 / (fan_in + fan_out)).

    The fans are arguments because a fused q, k, v weight must be filled by the fans of ONE of them: the fused shape
    would shrink every weight by √2.
    """
    return partial(_uniform, bound=math.sqrt(6 / (fan_in + fan_out)))


def lecun_normal(fan_in: int) -> Fill:
    """Normal of standard deviation √(1/fan_in) after truncation at two standard deviations of the one drawn from."""
    deviation_kept = 0.87962566103423978  # of a unit normal cut at ±2
    return partial(_truncated, std=math.sqrt(1 / fan_in) / deviation_kept)


@dataclass(frozen=True)
class Initial:
    """A parameter's shape and the rule that fills it."""

    shape: tuple[int, ...]
    fill: Fill

    def tensor(self, name: str, seed: int) -> torch.Tensor:
        """The initial value, fp32 on the CPU: a pure function of (seed, name)."""
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:4], "little"))
        tensor = torch.empty(self.shape, dtype=torch.float32, device="cpu")
        self.fill(tensor, generator)
        return tensor


class Initialised(nn.Module):
    """A module that owns parameters and knows how they start. Built with unset memory: call `reset_parameters`."""

    def declare(self, name: str, shape: tuple[int, ...], fill: Fill) -> None:
        """Own a parameter."""
        self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.initials[name] = Initial(shape, fill)

    @property
    def initials(self) -> dict[str, Initial]:
        """This module's own parameters, children's not included."""
        table: dict[str, Initial] = self.__dict__.setdefault("_initials", {})
        return table

    @torch.no_grad()
    def reset_parameters(self, names: Iterable[str] | None = None) -> None:
        """Fill this module's own parameters (or those named) from torch's global generator.

        A parameter that ZeRO-3 has emptied on this rank is passed over; whoever partitions it fills it from
        `initial_tensor`.
        """
        for name in self.initials if names is None else names:
            initial, parameter = self.initials[name], self.get_parameter(name)
            if tuple(parameter.shape) != initial.shape:
                continue
            if parameter.dtype == torch.float32:
                initial.fill(parameter, None)
            else:
                drawn = torch.empty(initial.shape, dtype=torch.float32, device=parameter.device)
                initial.fill(drawn, None)
                parameter.copy_(drawn)
