"""The gradient's norm, taken once: one sum over everything this rank will step, one all-reduce, one wait for the device.

DeepSpeed takes it flat by flat, with an all-reduce for each, after it has looked at every element for overflow, with one
more, and waits for the device each time it asks Python what came out. Here a gradient that is not finite shows in the
norm, and the norm comes to the host together with the mean loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from vitds import dist

CPU_PIECE = 2**16
"""Elements summed in fp32 on a CPU, where torch adds one after the other: over 49 million its norm is 0.4 % too small."""


class GradientNorm:
    """Takes the norm in place of a DeepSpeed wrapper, whose step then uses it; what is skipped and how it is clipped stays.

    Args:
        wrapper: `DeepSpeedEngine.optimizer` at stages 1, 2 or 3.
    """

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        self._taken: float | None = None
        self._used, self._loss_scale = 0.0, 1.0
        if isinstance(wrapper, BF16_Optimizer):
            wrapper.step = self._step_whole_gradients
        else:
            wrapper.check_overflow = lambda *_, **__: None  # the norm says it,
            wrapper.compute_grad_norm = True  # so it is asked for, whatever zero_optimization.compute_grad_norm says
        if isinstance(wrapper, DeepSpeedZeroOptimizer):
            wrapper.scaled_global_norm = lambda *_, **__: self._take()
            wrapper.unscale_and_clip_grads = self._scale
        elif isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
            # On the host: what DeepSpeed asks of it there waits for nothing.
            wrapper._get_norm_groups = lambda: [torch.tensor(self._take(), dtype=torch.float64)]
            flats = wrapper.fp32_partitioned_groups_flat
            wrapper.unscale_and_clip_grads = lambda index, _: self._scale([flats[index].grad], self._used)

    @staticmethod
    def serves(wrapper: Any) -> bool:
        """Whether it knows this wrapper; at stage 0 gradients are whole and DeepSpeed's own norm is used."""
        return isinstance(wrapper, (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, BF16_Optimizer))

    def measure(self, loss: torch.Tensor) -> float:
        """The mean of a number over the ranks; the norm of the finished gradient comes with it. Collective; waits.

        Args:
            loss: one number, on the device.
        """
        values = dist.sum_over_ranks(torch.stack([square_sum(self._gradients(), loss.device), loss.detach().double()]))
        squares, total = values.tolist()
        self._taken = math.sqrt(squares)
        return float(total) / dist.world_size()

    def forget(self) -> None:
        """The gradient has changed since it was measured."""
        self._taken = None

    def _take(self) -> float:
        """The norm, still times fp16's loss scale; inf or nan where the gradient is not finite."""
        if self._taken is None:
            self.measure(torch.zeros((), device=dist.device()))
        assert self._taken is not None
        self._used, self._taken = self._taken, None
        self._loss_scale = float(self.wrapper.loss_scale) if not isinstance(self.wrapper, BF16_Optimizer) else 1.0
        return self._used

    def _gradients(self) -> list[torch.Tensor]:
        """What this rank steps, reduced, before unscaling and clipping; padding is zero."""
        if isinstance(self.wrapper, BF16_Optimizer):
            return list(self.wrapper.fp32_groups_gradient_flat_partition)
        return [gradient for group in self.wrapper.averaged_gradients.values() for gradient in group]

    def _scale(self, gradients: Sequence[torch.Tensor], norm: float) -> None:
        """Divides by the loss scale and by max(1, (norm + 1e-6) / clip), DeepSpeed's rule. The scale is that which the loss
        had: DeepSpeed's own may have grown since, when it found the norm finite."""
        clip, scale = self.wrapper.clip_grad, self._loss_scale
        divisor = scale * max(1.0, (norm / scale + 1e-6) / clip) if clip > 0 else scale
        if divisor != 1:
            for gradient in gradients:
                gradient.mul_(1 / divisor)

    @torch.no_grad()
    def _step_whole_gradients(self, closure: None = None) -> None:
        """BF16_Optimizer's step, which takes the norm of the whole gradient on every rank and clips all of it."""
        wrapper, norm = self.wrapper, self._take()
        wrapper.overflow = not math.isfinite(norm)
        wrapper._global_grad_norm = math.inf if wrapper.overflow else norm
        if wrapper.overflow:
            wrapper.clear_hp_grads()
            wrapper.clear_lp_grads()
            return
        pairs = zip(wrapper.fp32_groups_flat_partition, wrapper.fp32_groups_gradient_flat_partition, strict=True)
        for master, gradient in pairs:
            if 0 < wrapper.clip_grad < norm + 1e-6:
                gradient.mul_(wrapper.clip_grad / (norm + 1e-6))
            master.grad = gradient
        wrapper.optimizer.step()
        wrapper._lazy_init_hp_params_optimizer_state()
        wrapper.update_lp_params()
        wrapper.clear_hp_grads()


def square_sum(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Σ x² over all elements, float64, on the device; not finite where an element is not, or a sum beyond fp32."""
    pieces = [
        piece
        for tensor in tensors
        if tensor.numel()
        for piece in (tensor.detach().view(-1).split(CPU_PIECE) if tensor.device.type == "cpu" else (tensor.detach(),))
    ]
    if not pieces:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(pieces, 2, dtype=torch.float32)).double().square().sum()
