"""Builds the DeepSpeed engine and says what the training loop needs of it, the same under every ZeRO stage."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import deepspeed
import torch

from vitds import dist
from vitds.errors import UserError
from vitds.layout import Shard
from vitds.optim import OPTIMIZERS, LayoutOptimizer, constructor_params
from vitds.optim.elementwise import assert_elementwise
from vitds.optim.groups import FLAT_ELEMENTS, Group, flats_of
from vitds.zero.foreign import ForeignState
from vitds.zero.lean import lean_section, make_lean
from vitds.zero.norm import GradientNorm
from vitds.zero.partitions import Partitions, loss_scaler_state, restore_loss_scaler, without_update

OWN_NAMES = ("Adam", "AdamW", "Lion")
"""DeepSpeed's own elementwise optimizers, by its names; it builds them itself from the JSON."""

UNFIT = ("Optimizer", "Adafactor", "Adagrad", "LBFGS", "Muon", "SparseAdam")
"""Of torch.optim: not elementwise, with state from the constructor that ZeRO's flats do not have, or for other gradients."""

WRAPPER_NOTES = {
    "BF16_Optimizer": "ZeRO-1 with fp32 accumulation keeps a full fp32 gradient on every GPU (4 bytes a parameter); "
    "ZeRO-2 keeps only this GPU's share",
    "FP16_UnfusedOptimizer": "ZeRO-0 keeps fp32 masters and optimizer state whole on every GPU",
}


class TrainingEngine:
    """A DeepSpeed engine whose masters, optimizer state and gradient norm can be named.

    Args:
        model: built on the meta device; its weights come later, through `master_shards()` and `refresh_weights()`.
        groups: the parameter groups, with base learning rates and decays.
        optimizer: type and params as in the run file's `optimizer`.
        section: DeepSpeed's half of the run file.
        gradient_accumulation_steps: micro batches per optimizer step on this world size.
        flat_elements: largest flat of a rank at stages 1 and 2 (`flats_of`).
    """

    def __init__(
        self,
        model: Any,
        groups: list[Group],
        optimizer: dict[str, Any],
        section: dict[str, Any],
        gradient_accumulation_steps: int,
        flat_elements: int = FLAT_ELEMENTS,
    ) -> None:
        _check_precision(section)
        self.groups = {group.name: group for group in groups}
        self.dtype = precision(section)
        """In which the model computes."""
        materialize(model, self.dtype)
        parameters = dict(model.named_parameters())
        for group in groups:
            for name in group.names:
                parameters[name].requires_grad_(not group.frozen)
        sizes = {name: parameter.numel() for name, parameter in parameters.items()}
        cut_here = zero_stage(section) in (1, 2)  # stage 3 cuts by itself, and stage 0 makes no flats
        parameter_groups = [
            {
                "params": [parameters[name] for name in names],
                "lr": group.lr * group.lr_mult,
                "weight_decay": group.weight_decay,
                "name": group.name,
            }
            for group in groups
            if not group.frozen and group.names
            for names in (flats_of(group.names, sizes, dist.world_size(), flat_elements) if cut_here else [group.names])
        ]
        section = {
            **lean_section(section),
            "zero_allow_untested_optimizer": True,
            "gradient_accumulation_steps": gradient_accumulation_steps,
        }
        client = client_optimizer(optimizer, zero_stage(section))
        if client is None:
            section["optimizer"] = {**optimizer, "params": constructor_params(optimizer.get("params", {}))}
        with contextlib.redirect_stdout(io.StringIO()):  # BF16_Optimizer prints a page about memory
            self.deepspeed, _, _, _ = deepspeed.initialize(
                model=model, model_parameters=parameter_groups, optimizer=client and _asleep(client), config=section
            )
        self.optimizer: Any = self.deepspeed.basic_optimizer
        self.optimizer.__dict__.pop("step", None)
        self.wrapper_name = type(self.deepspeed.optimizer).__name__
        make_lean(self.deepspeed)
        wrapper = self.deepspeed.optimizer
        self._norms = GradientNorm(wrapper) if GradientNorm.serves(wrapper) else None
        self.partitions = Partitions(self.deepspeed, model.shapes, model.factored_views())
        self.partitions.assert_masters_equal_weights()
        self.foreign: ForeignState | None = None
        if isinstance(self.optimizer, LayoutOptimizer):
            self.optimizer.bind(self.partitions.flats)
        else:
            self.foreign = ForeignState(self.optimizer, self.partitions.flats)
        self._norm = 0.0
        self._first_scale = loss_scaler_state(self.deepspeed)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The model's output."""
        return self.deepspeed(*inputs, **named)

    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode."""
        self.deepspeed.train(mode)

    def backward(self, loss: torch.Tensor) -> None:
        """Add one micro batch's gradient; reduced over the ranks where the stage does so."""
        scale = self._wrapper_scale()
        self.deepspeed.backward(loss * scale if scale != 1 else loss)
        if self._norms is not None:
            self._norms.forget()

    def mean_loss(self, losses: Sequence[torch.Tensor]) -> float:
        """Mean over a step's micro batches and over the ranks, after the last backward. Collective; waits for the device,
        and brings the gradient's norm along, so that `step` does not wait again."""
        mean = torch.stack(list(losses)).detach().double().mean()
        return dist.mean(mean) if self._norms is None else self._norms.measure(mean)

    def step(self, drop: bool = False) -> bool:
        """After each micro batch's backward. True when the weights were updated, False inside an accumulation or
        when DeepSpeed found a gradient that is not finite and skipped the update.

        Args:
            drop: at the end of an accumulation, throw its gradient away: the weights, the optimizer's state and
                counters and the loss scale stay as they are.
        """
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()
            return False
        before = self.deepspeed.skipped_steps
        unwrapped = self.deepspeed.optimizer is self.optimizer
        if unwrapped:
            # Here DeepSpeed has no norm to give, and would step with gradients that are not finite.
            gradients = [p.grad for p in self.partitions.parameters.values() if p.grad is not None]
            self._norm = float(torch.nn.utils.get_total_norm(gradients))
            if drop or not math.isfinite(self._norm):
                self.deepspeed.zero_grad()
                self.deepspeed.micro_steps += 1
                return False
        scale = self._wrapper_scale()
        with without_update(self.deepspeed) if drop else contextlib.nullcontext():
            self.deepspeed.step()
        if not unwrapped:
            norm = self.deepspeed.get_global_grad_norm()
            self._norm = float(norm) / scale if norm is not None else math.nan
        return not drop and self.deepspeed.skipped_steps == before

    @property
    def gradient_norm(self) -> float:
        """Global norm of the last step's gradient before clipping; inf or nan when it was not finite."""
        return self._norm

    def set_learning_rate(self, factor: float) -> float:
        """Give every group its base rate times `factor`; the largest is returned."""
        for group in self.optimizer.param_groups:
            ours = self.groups[group["name"]]
            group["lr"] = ours.lr * ours.lr_mult * factor
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return int(self.deepspeed.zero_optimization_stage())

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return torch.device(self.deepspeed.device)

    def master_shards(self) -> list[Shard]:
        """This rank's part of the masters, fp32 or bf16, as live views; call `refresh_weights` after writing."""
        return self.partitions.master_shards()

    def state_shards(self, *, to_fill: bool = False) -> list[Shard]:
        """This rank's part of the optimizer's state, as live views named `<parameter>.<state>`.

        Args:
            to_fill: before the first step, to be filled from a checkpoint.
        """
        return self.optimizer.state_shards() if self.foreign is None else self.foreign.shards(to_fill)

    def forget(self) -> None:
        """Drop the optimizer's state and the loss scale, as before the first step; the weights stay."""
        restore_loss_scaler(self.deepspeed, self._first_scale)
        if self.foreign is None:
            self.optimizer.state.clear()
        else:
            self.foreign.forget()

    def refresh_weights(self) -> None:
        """Make the computing weights follow the masters. Collective."""
        self.partitions.refresh_weights()
        self.partitions.assert_masters_equal_weights()

    def counters(self) -> dict[str, Any]:
        """What besides tensors must survive: the optimizer's update count, foreign scalars, fp16's loss scale."""
        scalars = {"updates": self.optimizer.updates} if self.foreign is None else self.foreign.scalars()
        return {"optimizer": scalars, "loss_scale": loss_scaler_state(self.deepspeed)}

    def restore_counters(self, counters: dict[str, Any]) -> None:
        """Put back what `counters` returned."""
        if self.foreign is None:
            self.optimizer.updates = counters["optimizer"]["updates"]
        else:
            self.foreign.restore_scalars(counters["optimizer"])
        restore_loss_scaler(self.deepspeed, counters.get("loss_scale", {}))

    def clipping_factor(self) -> float:
        """What the last gradient was divided by: max(1, (norm + 1e-6) / clip), DeepSpeed's rule."""
        clip = self.deepspeed.gradient_clipping()
        return max(1.0, (self._norm + 1e-6) / clip) if clip else 1.0

    def describe(self) -> str:
        """Stage, precision, wrapper, and the bytes of optimizer state a parameter costs on this rank."""
        parts = self._measured_state() if self.foreign is None else self.foreign.describe()
        note = WRAPPER_NOTES.get(self.wrapper_name)
        return (
            f"ZeRO-{self.deepspeed.zero_optimization_stage()} on {dist.world_size()} rank(s), {self.deepspeed.get_data_types()[0]}, "
            f"wrapper {self.wrapper_name}; {type(self.optimizer).__name__} holds, in bytes per master weight on this rank: "
            f"{parts or 'nothing'}" + (f"\nnote: {note}" if note else "")
        )

    def _measured_state(self) -> str:
        """Bytes of each kind of state, per master weight on this rank."""
        held: dict[str, int] = {}
        for shard in self.state_shards():
            kind = shard.name.rsplit(".", 1)[1]
            held[kind] = held.get(kind, 0) + shard.data.nbytes
        trained = sum(fragment.numel for flat in self.partitions.flats for fragment in flat.fragments)
        return ", ".join(f"{kind} {size / max(trained, 1):.4f}" for kind, size in held.items())

    def close(self) -> None:
        """Let go of the engine, so that the process groups it holds can be destroyed."""
        self.deepspeed.destroy()

    def _wrapper_scale(self) -> float:
        """fp16's loss scale at ZeRO-0: there DeepSpeed's step divides by it, but its `backward` does not multiply, and its norm
        still carries it; 1 elsewhere."""
        if self.deepspeed.fp16_enabled() and not self.deepspeed.zero_optimization():
            return float(self.deepspeed.optimizer.loss_scale)
        return 1.0


def precision(section: dict[str, Any]) -> torch.dtype:
    """The dtype in which the model computes."""
    if section.get("bf16", {}).get("enabled"):
        return torch.bfloat16
    return torch.float16 if section.get("fp16", {}).get("enabled") else torch.float32


def zero_stage(section: dict[str, Any]) -> int:
    """The ZeRO stage of DeepSpeed's half of the run file."""
    return int(section.get("zero_optimization", {}).get("stage", 0))


def _check_precision(section: dict[str, Any]) -> None:
    """Refuse 16-bit arithmetic that this device does not have, before DeepSpeed raises from within."""
    here = deepspeed.accelerator.get_accelerator()
    dtype = precision(section)
    supported = {torch.float16: here.is_fp16_supported, torch.bfloat16: here.is_bf16_supported}.get(dtype, lambda: True)
    if not supported():
        word, other = ("fp16", "bf16") if dtype == torch.float16 else ("bf16", "fp16")
        raise UserError(f"{word}.enabled: {here.device_name()} does not compute in {word}; use {other}, or fp32")


def materialize(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give a meta-device model memory, filled with noise.

    Noise, because each value then occurs hardly twice: when the layout read off DeepSpeed is checked against the
    weights, a fragment taken from the wrong place is found, which zeros and ones would hide. The true weights are
    written into the fp32 masters afterwards, so no fp32 copy of the model ever exists.
    """
    model.to(dtype).to_empty(device=dist.device())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.5, 1.5)


def client_optimizer(optimizer: dict[str, Any], stage: int) -> Callable[[Any], torch.optim.Optimizer] | None:
    """A factory for the named optimizer, or None where DeepSpeed builds its own.

    Raises:
        UserError: under ZeRO, an optimizer whose update is not elementwise and knows no layout.
    """
    name, params = optimizer["type"], constructor_params(optimizer.get("params", {}))
    cls: Any = OPTIMIZERS.get(name)
    if cls is None and name in OWN_NAMES:
        return None
    if cls is None:
        cls = getattr(torch.optim, name)
    if stage > 0 and not issubclass(cls, LayoutOptimizer):
        assert_elementwise(cls, params)
    return lambda groups: cls(groups, **params)


def _asleep(factory: Callable[[Any], torch.optim.Optimizer]) -> Callable[[Any], torch.optim.Optimizer]:
    """The factory, whose optimizer does nothing until the engine is built.

    At stage 0 in 16 bits DeepSpeed steps the optimizer once while it builds its wrapper, with zero gradients: the count
    would start at 1 and decay would already have shrunk the masters.
    """

    def build(groups: Any) -> torch.optim.Optimizer:
        optimizer = factory(groups)
        optimizer.__dict__["step"] = lambda *_, **__: None
        return optimizer

    return build


def other_optimizer_names() -> list[str]:
    """The names besides those of OPTIMIZERS that `optimizer.type` may have: DeepSpeed's and torch's."""
    torch_names = [
        n for n, v in vars(torch.optim).items() if isinstance(v, type) and issubclass(v, torch.optim.Optimizer)
    ]
    return [*OWN_NAMES, *sorted(set(torch_names) - {*OWN_NAMES, *UNFIT})]
