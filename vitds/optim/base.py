"""What every optimizer of ours shares: it steps flat tensors in which parameters lie cut and concatenated.

DeepSpeed hands an inner optimizer flat 1-D tensors, changes `param_groups[i]["params"]` between calls, and calls
`step()` once per update, once per group or once per sub-group, depending on the ZeRO stage. So nothing here counts
calls or trusts a position: state and the update counter live with the tensor, and what lies in a tensor is looked up
in the `Flat`s given to `bind`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch

from vitds.errors import UserError
from vitds.layout import Flat, Shard, whole
from vitds.optim import kernels, rounding

DTYPES = (torch.float32, torch.bfloat16)
CPU_CHUNK = 2**18
"""Elements worked on at a time on a CPU: large enough to share among threads, small enough to stay in the cache."""


def check_range(name: str, value: float, low: float, high: float | None = None) -> None:
    """Refuses a number outside [low, high), or outside [low, ∞) without `high`.

    Raises:
        UserError: the value is not a number in the range.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not value >= low or (high is not None and not value < high):
        allowed = f"a number ≥ {low}" if high is None else f"a number in [{low}, {high})"
        raise UserError(f"optimizer.params.{name}: {value!r} is not {allowed}")


class LayoutOptimizer(torch.optim.Optimizer):
    """Base of the optimizers that give the same result however their parameters are cut.

    Used alone, every parameter of the groups is a flat that holds itself; a group may name its parameters in "names"
    and give the shapes in which a factored optimizer sees them in "views" (lists along "params"; an absent or None
    view is the parameter's own shape). Under ZeRO, `bind(flats)` says what lies in each tensor it will step.

    Subclasses say which state a flat has (`_new_state`), how it updates (`_update`, and with Triton `_update_whole`)
    and under which parameter names the state is saved (`_shards_of`). The momentum "exp_avg" is bf16 in all of them,
    other state fp32. Parameters and flats are fp32, or bf16 and then rounded stochastically (vitds.optim.rounding).

    Args:
        params: parameters or group dicts; extra keys of a group (`name`, `lr_mult`) survive.
        lr: learning rate of groups that give none, ≥ 0.
        weight_decay: decoupled decay of groups that give none, ≥ 0; scaled by the learning rate (torch's convention):
            θ ← θ − lr·(update + weight_decay·θ).
        rounding_seed: of the random bits by which bf16 weights are rounded; fp32 weights do not feel it.

    Raises:
        UserError: a rate or a decay is negative, the seed no integer ≥ 0.
    """

    momentum_dtype: ClassVar[torch.dtype] = torch.bfloat16
    kernels: str = "auto"
    """"auto": Triton's on CUDA, where they work (vitds.optim.kernels), else torch's; "torch" or "triton": always."""

    def __init__(self, params: Iterable[Any], *, lr: float, weight_decay: float, rounding_seed: int = 0) -> None:
        self._flats: dict[int, Flat] = {}
        self._bound = False
        check_range("lr", lr, 0)
        check_range("weight_decay", weight_decay, 0)
        if not isinstance(rounding_seed, int) or isinstance(rounding_seed, bool) or rounding_seed < 0:
            raise UserError(f"optimizer.params.rounding_seed: {rounding_seed!r} is not an integer ≥ 0")
        self.rounding_seed = rounding_seed
        self._tables: dict[int, Any] = {}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        for group in self.param_groups:
            check_range("lr", group["lr"], 0)
            check_range("weight_decay", group["weight_decay"], 0)

    def bind(self, flats: list[Flat]) -> None:
        """Tell the optimizer what lies in each tensor it will step. All ranks of a flat's group bind alike.

        State of a tensor that is bound again stays; a tensor that is no longer there may not have had any.
        """
        bound = {id(flat.tensor): flat for flat in flats}
        assert len(bound) == len(flats), "two flats share a tensor"
        for flat in flats:
            assert flat.tensor.dtype in DTYPES, f"flats are masters in fp32 or bf16, found {flat.tensor.dtype}"
            earlier = self._flats.get(id(flat.tensor))
            moved = self.state.get(flat.tensor) and earlier is not None and earlier.fragments != flat.fragments
            assert not moved, "a tensor with optimizer state was given another layout"
        lost = [tensor for tensor, state in self.state.items() if state and id(tensor) not in bound]
        assert not lost, f"bind would drop the state of {len(lost)} tensors"
        self._flats, self._bound, self._tables = bound, True, {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every tensor that is in `param_groups` now and has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is None:
                    continue
                flat = self._flat_of(tensor)
                state = self._state_of(flat)
                state["step"] += 1
                grad, lr, weight_decay = tensor.grad.reshape(-1), group["lr"], group["weight_decay"]
                if kernels.chosen(self.kernels, tensor) and grad.dtype in DTYPES and self._has_kernels():
                    self._update_whole(flat, grad, state, lr, weight_decay)
                else:
                    self._update(flat, grad.float(), state, lr, weight_decay)
        return loss

    def state_shards(self) -> list[Shard]:
        """This rank's part of all state, named "<parameter>.<state>", as live views; allocates what is missing.

        Every fragment of every flat is listed, also those of which this rank holds nothing; padding never is.
        """
        return [shard for flat in self._all_flats() for shard in self._shards_of(flat, self._state_of(flat))]

    @property
    def updates(self) -> int:
        """Number of updates made; setting it sets the counter of every flat."""
        return max((state["step"] for state in self.state.values() if state), default=0)

    @updates.setter
    def updates(self, value: int) -> None:
        for flat in self._all_flats():
            self._state_of(flat)["step"] = value

    def state_bytes(self) -> int:
        """Bytes of optimizer state that this rank holds, measured on the allocated tensors."""
        states = [self._state_of(flat) for flat in self._all_flats()]
        return sum(t.numel() * t.element_size() for state in states for t in state.values() if torch.is_tensor(t))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps its dtype: torch casts it to the parameter's, which would make momentum fp32."""
        super().load_state_dict(state_dict)
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        for tensor, index in zip(tensors, ids, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if torch.is_tensor(value):
                    dtype = self.momentum_dtype if key == "exp_avg" else torch.float32
                    self.state[tensor][key] = value.to(tensor.device, dtype, copy=True)

    def _new_state(self, flat: Flat) -> dict[str, torch.Tensor]:
        """State of a flat before its first update: flat tensors, no nested containers."""
        raise NotImplementedError

    def _update(self, flat: Flat, grad: torch.Tensor, state: dict[str, Any], lr: float, weight_decay: float) -> None:
        """One update of `flat.tensor` from its gradient, fp32 (flat.tensor.numel(),); state["step"] counts from 1."""
        raise NotImplementedError

    def _update_whole(
        self, flat: Flat, grad: torch.Tensor, state: dict[str, Any], lr: float, weight_decay: float
    ) -> None:
        """The same by kernels that take the flat in a few launches; the gradient is fp32 or bf16."""
        raise NotImplementedError

    def _has_kernels(self) -> bool:
        return type(self)._update_whole is not LayoutOptimizer._update_whole

    def _runs_of(self, flat: Flat) -> torch.Tensor:
        """The table by which elementwise kernels walk a flat."""
        from vitds.optim.kernels import tables

        if id(flat.tensor) not in self._tables:
            self._tables[id(flat.tensor)] = tables.runs(flat, self.rounding_seed)
        return self._tables[id(flat.tensor)]  # type: ignore[no-any-return]

    def _keep(self, flat: Flat, state: dict[str, Any], offset: int, weights: torch.Tensor, new: torch.Tensor) -> None:
        """Brings elements of a flat, from `offset` on, to their new fp32 values; for fp32 ones they are there already."""
        if new is not weights:
            rounding.store(flat, self.rounding_seed, state["step"], offset, weights, new)

    def _shards_of(self, flat: Flat, state: dict[str, Any]) -> list[Shard]:
        """Here: every state tensor is laid out like the flat."""
        return [shard for key, tensor in state.items() if key != "step" for shard in laid_out_like(flat, key, tensor)]

    def _state_of(self, flat: Flat) -> dict[str, Any]:
        state = self.state[flat.tensor]
        if not state:
            state["step"] = 0
            state.update(self._new_state(flat))
        return state

    def _flat_of(self, tensor: torch.Tensor) -> Flat:
        if id(tensor) not in self._flats:
            assert not self._bound, "step() was given a tensor that bind() was not told of"
            self._add_whole_flats()
        return self._flats[id(tensor)]

    def _all_flats(self) -> list[Flat]:
        if not self._bound:
            self._add_whole_flats()
        return list(self._flats.values())

    def _add_whole_flats(self) -> None:
        index = 0
        for group in self.param_groups:
            names, views = group.get("names"), group.get("views")
            for i, tensor in enumerate(group["params"]):
                assert tensor.dtype in DTYPES, f"parameters are fp32 or bf16, found {tensor.dtype}"
                name = names[i] if names else f"param_{index}"
                index += 1
                self._flats.setdefault(id(tensor), whole(name, tensor, tuple(views[i]) if views and views[i] else None))


def laid_out_like(flat: Flat, key: str, tensor: torch.Tensor) -> list[Shard]:
    """The shards of a state tensor with one element for each of the flat's."""
    whole_here = flat.group is None
    return [Shard(f"{f.name}.{key}", f.shape, f.of(tensor), f.start, flat.group, whole_here) for f in flat.fragments]


def chunk_of(flat: Flat) -> int:
    """Elements of a flat to work on at a time: what fits a CPU's cache, or one parameter on an accelerator."""
    if flat.tensor.device.type == "cpu":
        return CPU_CHUNK
    return max([CPU_CHUNK, *(fragment.total for fragment in flat.fragments)])


def in_chunks(chunk: int, *tensors: torch.Tensor) -> Iterable[Sequence[torch.Tensor]]:
    """Walks 1-D tensors of one length together, `chunk` elements at a time."""
    return zip(*(tensor.split(chunk) for tensor in tensors), strict=True)


def widened(values: torch.Tensor) -> torch.Tensor:
    """fp32 tensors as they are, bf16 ones as a copy in fp32."""
    return values if values.dtype == torch.float32 else values.float()
