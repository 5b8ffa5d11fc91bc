"""State of optimizers that are not ours (DeepSpeed's own, torch's, a user's), learnt by trying one out.

Under ZeRO such an optimizer sees flat pieces, so only state of the flat's own shape (cut like the parameter) and scalars
(the same everywhere) can be named, saved and put back. Anything else is refused at start. State is allocated here only
to be filled from a checkpoint: many classes give it other first values than zero, and only when they find none.
"""

from __future__ import annotations

from typing import Any

import torch

from vitds.errors import UserError
from vitds.layout import Flat, Shard


class ForeignState:
    """Names the state of a foreign optimizer in terms of a layout.

    Args:
        optimizer: the optimizer inside DeepSpeed's wrapper, never stepped yet.
        flats: what it steps on this rank.

    Raises:
        UserError: it keeps state that is neither of the parameter's shape nor a scalar.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, flats: list[Flat]) -> None:
        self.optimizer, self.flats = optimizer, flats
        self.tensors: dict[str, torch.dtype] = {}
        self.state_scalars: dict[str, Any] = {}
        # A build-time step of DeepSpeed's (ZeRO-0 in 16 bits) leaves counts behind; the run starts from none.
        self.forget()
        self.group_scalars = self._learn()

    def forget(self) -> None:
        """Drop everything kept, counts included."""
        self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            group.pop("step", None)

    def _learn(self) -> list[str]:
        """Step a small tensor with the same class and settings, and look at what it keeps."""
        device = self.flats[0].tensor.device if self.flats else torch.device("cpu")
        probe = torch.nn.Parameter(torch.zeros(8, device=device))
        kept = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        state, groups = self.optimizer.state, self.optimizer.param_groups
        try:
            # The object itself is lent the probe: some classes cannot be built a second time from their settings.
            self.optimizer.state = type(state)(dict)
            self.optimizer.param_groups = [{**kept[0], "params": [probe]}]
            probe.grad = torch.ones_like(probe)
            try:
                self.optimizer.step()
            except Exception as error:
                raise UserError(
                    f"optimizer.type: {type(self.optimizer).__name__} cannot step a tensor that it was not built with, "
                    f"and ZeRO gives it such: {type(error).__name__}: {error}"
                ) from error
            for key, value in self.optimizer.state[probe].items():
                if torch.is_tensor(value) and value.shape == probe.shape:
                    self.tensors[key] = value.dtype
                elif isinstance(value, (int, float)) or (torch.is_tensor(value) and value.numel() == 1):
                    self.state_scalars[key] = value
                elif value is not None:
                    raise UserError(
                        f"optimizer.type: {type(self.optimizer).__name__} keeps {key!r}, which is neither of the parameter's shape "
                        "nor a number; it cannot be saved or cut over ranks. Derive it from vitds.optim.base.LayoutOptimizer"
                    )
            return [
                k
                for k, v in self.optimizer.param_groups[0].items()
                if k not in kept[0] and isinstance(v, (int, float)) and k != "params"
            ]
        finally:
            self.optimizer.state, self.optimizer.param_groups = state, groups

    def describe(self) -> str:
        """Names and sizes of what it keeps for a parameter."""
        return ", ".join(f"{key} {dtype.itemsize:.4f}" for key, dtype in self.tensors.items())

    def shards(self, to_fill: bool) -> list[Shard]:
        """Live views of the state of every fragment.

        Args:
            to_fill: make what is not there yet, to be filled from a checkpoint; else there must have been a step.
        """
        out = []
        for flat in self.flats:
            state = self.optimizer.state[flat.tensor]
            for key, dtype in self.tensors.items():
                if to_fill and key not in state:
                    state[key] = torch.zeros_like(flat.tensor, dtype=dtype, requires_grad=False)
                out += [
                    Shard(f"{f.name}.{key}", f.shape, f.of(state[key]), f.start, flat.group, flat.group is None)
                    for f in flat.fragments
                ]
        return out

    def scalars(self) -> dict[str, Any]:
        """The numbers kept beside tensors, the same for every flat."""
        states = [self.optimizer.state[flat.tensor] for flat in self.flats if flat.tensor.numel()]
        groups = self.optimizer.param_groups
        return {
            "state": {key: float(states[0][key]) for key in self.state_scalars} if states else {},
            "group": {key: groups[0].get(key, 0) for key in self.group_scalars},
        }

    def restore_scalars(self, scalars: dict[str, Any]) -> None:
        """Put back what `scalars` returned."""
        for flat in self.flats:
            state = self.optimizer.state[flat.tensor]
            for key, value in scalars["state"].items():
                example = self.state_scalars[key]
                state[key] = torch.full_like(example, value) if torch.is_tensor(example) else type(example)(value)
        for group in self.optimizer.param_groups:
            group.update(scalars["group"])
