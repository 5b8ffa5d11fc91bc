"""Adam with its first moment in half precision ("Scaling Vision Transformers", arXiv 2106.04560, §3.4)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from vitds.errors import UserError
from vitds.layout import Flat
from vitds.optim.base import LayoutOptimizer, check_range, chunk_of, in_chunks, widened


class HalfPrecisionMomentumAdam(LayoutOptimizer):
    """AdamW with a bf16 first and an fp32 second moment: 6 bytes of state a parameter instead of 8.

    With t = 1, 2, …, all arithmetic in fp32, m stored rounded to bf16 but applied unrounded:

        m ← β1·m + (1 − β1)·g          v ← β2·v + (1 − β2)·g²
        θ ← θ − lr·( m/(1 − β1ᵗ) / (√(v/(1 − β2ᵗ)) + eps) + weight_decay·θ )

    Elementwise, so exact however parameters are cut.

    Args:
        params: parameters or group dicts, see `LayoutOptimizer`.
        lr: learning rate.
        betas: (β1, β2), each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled, scaled by lr.
        rounding_seed: see `LayoutOptimizer`.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rounding_seed: int = 0,
    ) -> None:
        if not isinstance(betas, (list, tuple)) or len(betas) != 2:
            raise UserError(f"optimizer.params.betas: {betas!r} is not a pair of numbers in [0, 1)")
        check_range("betas[0]", betas[0], 0, 1)
        check_range("betas[1]", betas[1], 0, 1)
        check_range("eps", eps, 0)
        self.beta1, self.beta2, self.eps = betas[0], betas[1], eps
        super().__init__(params, lr=lr, weight_decay=weight_decay, rounding_seed=rounding_seed)

    def _new_state(self, flat: Flat) -> dict[str, torch.Tensor]:
        return {
            "exp_avg": torch.zeros_like(flat.tensor, dtype=self.momentum_dtype),
            "exp_avg_sq": torch.zeros_like(flat.tensor, dtype=torch.float32),  # in bf16 it hurts (§3.4)
        }

    def _corrected(self, step: int) -> tuple[float, float]:
        """m/c1 / (√(v/c2) + eps) = (√c2/c1) · m / (√v + eps·√c2), one division an element instead of three: both factors."""
        root_correction2 = math.sqrt(1 - self.beta2**step)
        return root_correction2 / (1 - self.beta1**step), self.eps * root_correction2

    def _update(self, flat: Flat, grad: torch.Tensor, state: dict[str, Any], lr: float, weight_decay: float) -> None:
        scale, eps = self._corrected(state["step"])
        chunk, offset = chunk_of(flat), 0
        buffers = torch.empty(2, min(chunk, grad.numel()), device=grad.device)
        weights, exp_avg, exp_avg_sq = (t.view(-1) for t in (flat.tensor, state["exp_avg"], state["exp_avg_sq"]))
        for weight, g, m, v in in_chunks(chunk, weights, grad, exp_avg, exp_avg_sq):
            w, m32, denominator = widened(weight), buffers[0, : len(g)], buffers[1, : len(g)]
            m32.copy_(m).lerp_(g, 1 - self.beta1)
            m.copy_(m32)
            v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
            torch.sqrt(v, out=denominator).add_(eps)
            if weight_decay:
                w.add_(w, alpha=-lr * weight_decay)  # not w.mul_(1 - lr·wd): fp32 knows 1 - 2.4e-5 to 0.1 % only
            w.addcdiv_(m32, denominator, value=-lr * scale)
            self._keep(flat, state, offset, weight, w)
            offset += len(g)

    def _update_whole(
        self, flat: Flat, grad: torch.Tensor, state: dict[str, Any], lr: float, weight_decay: float
    ) -> None:
        from vitds.optim.kernels import elementwise

        ratio, eps = self._corrected(state["step"])
        elementwise.step(
            elementwise.ADAM, self._runs_of(flat), flat.tensor, grad, state["exp_avg"], state["step"], lr, weight_decay,
            self.beta1, 1 - self.beta1, state["exp_avg_sq"], self.beta2, 1 - self.beta2, ratio, eps,
        )  # fmt: skip
