"""SGD with momentum in half precision, for fine-tuning (the big_vision reference's `momentum_hp`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from vitds.layout import Flat
from vitds.optim.base import LayoutOptimizer, check_range, chunk_of, in_chunks, widened


class HalfPrecisionMomentumSGD(LayoutOptimizer):
    """Heavy-ball SGD with bf16 momentum: 2 bytes of state a parameter.

    In fp32, m stored rounded to bf16 but applied unrounded; no (1 − momentum) factor, no Nesterov:

        m ← g + momentum·m          θ ← θ − lr·(m + weight_decay·θ)

    Elementwise, so exact however parameters are cut.

    Args:
        params: parameters or group dicts, see `LayoutOptimizer`.
        lr: learning rate.
        momentum: in [0, 1).
        weight_decay: decoupled, scaled by lr.
        rounding_seed: see `LayoutOptimizer`.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        rounding_seed: int = 0,
    ) -> None:
        check_range("momentum", momentum, 0, 1)
        self.momentum = momentum
        super().__init__(params, lr=lr, weight_decay=weight_decay, rounding_seed=rounding_seed)

    def _new_state(self, flat: Flat) -> dict[str, torch.Tensor]:
        return {"exp_avg": torch.zeros_like(flat.tensor, dtype=self.momentum_dtype)}

    def _update(self, flat: Flat, grad: torch.Tensor, state: dict[str, Any], lr: float, weight_decay: float) -> None:
        chunk, offset = chunk_of(flat), 0
        buffer = torch.empty(min(chunk, grad.numel()), device=grad.device)
        for weight, g, m in in_chunks(chunk, flat.tensor.view(-1), grad, state["exp_avg"].view(-1)):
            w, m32 = widened(weight), buffer[: len(g)]
            torch.add(g, m32.copy_(m), alpha=self.momentum, out=m32)
            m.copy_(m32)
            if weight_decay:
                m32.add_(w, alpha=weight_decay)
            w.add_(m32, alpha=-lr)
            self._keep(flat, state, offset, weight, w)
            offset += len(g)

    def _update_whole(
        self, flat: Flat, grad: torch.Tensor, state: dict[str, Any], lr: float, weight_decay: float
    ) -> None:
        from vitds.optim.kernels import elementwise

        elementwise.step(
            elementwise.SGD, self._runs_of(flat), flat.tensor, grad, state["exp_avg"], state["step"], lr, weight_decay,
            self.momentum, 1.0,
        )  # fmt: skip
