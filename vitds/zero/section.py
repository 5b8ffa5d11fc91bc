"""DeepSpeed's half of the run file: handed on verbatim, but read as a whole first.

DeepSpeed ignores misspelt keys in most of its sections. Its own reader is therefore given a dict that remembers what
was asked for, before any process group exists; a key nobody asked for is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pydantic
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.config_utils import DeepSpeedConfigModel

from vitds.errors import UserError, nearest, one_of
from vitds.sections import typed

REFUSED = {
    "activation_checkpointing": "vitds does its own; set vitds.train.activation_checkpointing to none, full, every:N or selective",
    "torch_autocast": "use bf16 or fp16: the masters are fp32 and the weights are cast once, not at every layer",
    "amp": "use bf16 or fp16",
    "compile": "set vitds.train.compile",
    "gradient_allreduce_op": "the gradient is the mean over the global batch, as in the paper",
    "checkpoint": "checkpoints are vitds's own (safetensors); see vitds.checkpoint",
    "datastates_ckpt": "checkpoints are vitds's own (safetensors); see vitds.checkpoint",
    "data_efficiency": "the image stream is vitds's own; see vitds.data",
    "tensor_parallel": "tensor parallelism would cut matrices in a way the optimizers' layout does not know",
    "pipeline": "pipeline parallelism is not implemented",
    "comet": "monitors are tensorboard, wandb and csv_monitor",
    "weight_quantization": "it changes the weights under the optimizer",
    "managed_gradient_accumulation": "accumulation follows from train_batch_size and the number of GPUs",
}
"""Top-level keys that DeepSpeed reads and vitds does not support, each with what to do instead."""

REFUSED_ZERO = {
    "cpu_offload": "the masters would live elsewhere than the optimizer's layout says; use more GPUs or ZeRO-3",
    "cpu_offload_param": "the weights would live elsewhere than the layout says; use ZeRO-3 without offload",
    "offload_optimizer": "the masters would live elsewhere than the optimizer's layout says; use more GPUs or ZeRO-3",
    "offload_param": "the weights would live elsewhere than the layout says; use ZeRO-3 without offload",
    "elastic_checkpoint": "vitds's checkpoints already fit any number of GPUs",
    "zero_quantized_weights": "it changes the weights the forward pass sees",
    "zero_quantized_gradients": "it changes the gradients",
    "zenflow": "it steps the optimizer on other slices than the layout says",
    "super_offload": "it steps another optimizer",
}
"""`zero_optimization` keys that would make an exact optimizer inexact."""


SCALARS: dict[str, Any] = {
    "train_batch_size": int, "train_micro_batch_size_per_gpu": int, "gradient_accumulation_steps": int,
    "gradient_clipping": float, "gradient_predivide_factor": float, "prescale_gradients": bool, "steps_per_print": int | None,
    "wall_clock_breakdown": bool, "memory_breakdown": bool, "dump_state": bool, "disable_allgather": bool,
    "zero_allow_untested_optimizer": bool, "communication_data_type": str | None, "bf16": dict, "fp16": dict,
    "zero_optimization": dict, "data_types": dict,
}  # fmt: skip
"""Types of the top-level keys, which DeepSpeed takes as they come."""

DTYPES = ("fp32", "bf16", "fp16")


class _Asked(dict[str, Any]):
    """A dict, nested ones too, that remembers which keys were looked at."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__({k: _Asked(v) if isinstance(v, dict) else v for k, v in given.items()})
        self.asked: set[str] = set()

    def __getitem__(self, word: str) -> Any:
        self.asked.add(word)
        return super().__getitem__(word)

    def __contains__(self, word: object) -> bool:
        self.asked.add(str(word))
        return super().__contains__(word)

    def __iter__(self) -> Iterator[str]:
        # Python copies `**section` behind our back unless a dict iterates in its own way.
        return iter(list(self.keys()))

    def get(self, word: str, default: Any = None) -> Any:
        self.asked.add(word)
        return super().get(word, default)

    def pop(self, word: str, *default: Any) -> Any:
        self.asked.add(word)
        return super().pop(word, *default)

    def unread(self, path: str = "") -> Iterator[tuple[str, str, set[str]]]:
        """(where, word, words that were asked for there) for every key nobody looked at."""
        for word in self.keys():
            if word not in self.asked:
                yield path, word, self.asked
            elif isinstance(value := dict.__getitem__(self, word), _Asked):
                yield from value.unread(f"{path}{word}.")


def check_deepspeed_section(section: dict[str, Any], *, free_form: tuple[str, ...] = ("optimizer.params.",)) -> None:
    """Refuse what DeepSpeed would ignore, what it would raise on, and what would make the optimizers inexact.

    Args:
        section: the run file without the sections that vitds owns.
        free_form: places whose keys belong to somebody else.

    Raises:
        UserError: naming the key's path, the value, and the nearest right word.
    """
    for word, instead in REFUSED.items():
        if word in section:
            raise UserError(f"{word}: not supported; {instead}")
    for word, kind in SCALARS.items():
        if word in section:
            value = typed(section[word], kind, word)
            if isinstance(value, (int, float)) and value < (1 if kind is int else 0):
                raise UserError(f"{word}: {value!r} is too small")
    for word in section.get("data_types", {}):
        if word in ("param_dtype", "buffer_dtype", "keep_in_fp32_modules"):
            raise UserError(f"data_types.{word}: not supported; the precision is that of bf16, fp16 or neither")
    accumulate = section.get("data_types", {}).get("grad_accum_dtype")
    if accumulate is not None and accumulate not in DTYPES:
        raise UserError(one_of("data_types.grad_accum_dtype", accumulate, DTYPES))
    zero = section.get("zero_optimization", {})
    for word, instead in REFUSED_ZERO.items():
        value = zero.get(word)
        if value and not (isinstance(value, dict) and value.get("device") == "none"):
            raise UserError(f"zero_optimization.{word}: not supported; {instead}")
    gathered = zero.get("allgather_bucket_size")
    if isinstance(gathered, (int, float)) and gathered % 2:
        raise UserError(f"zero_optimization.allgather_bucket_size: {gathered!r} is not even, as DeepSpeed asks")
    for precision in ("bf16", "fp16"):
        typed(section.get(precision, {}).get("enabled", False), bool, f"{precision}.enabled")
        if section.get(precision, {}).get("check_grad_overflow") is False:
            raise UserError(
                f"{precision}.check_grad_overflow: cannot be switched off; gradients that are not finite would be applied"
            )
        for word, value in section.get(precision, {}).items():
            if word in ("fp16_master_weights_and_grads", "fp16_optimizer_states") and value:
                raise UserError(
                    f"{precision}.{word}: not supported; the masters are fp32, the momentum is already bf16"
                )
    _check_bf16_masters(section)
    # Without a process group DeepSpeed takes the world size for 1; vitds.config does the batch arithmetic instead.
    batch = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    asked = _Asked({**section, **batch})
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        DeepSpeedConfig(asked)
    except pydantic.ValidationError as error:
        raise UserError(_say(error, section)) from None
    except Exception as error:  # DeepSpeed raises every kind of exception at a bad value; all of them are the user's
        raise UserError(f"DeepSpeed refuses its half of the run file: {error or type(error).__name__}") from None
    finally:
        logging.disable(level)
    for path, word, known in asked.unread():
        if path not in free_form:
            raise UserError(f"{path}{word}: DeepSpeed never reads such a key{nearest(word, known)}")


def bf16_masters(section: dict[str, Any]) -> bool:
    """Whether the masters are bf16, to be rounded stochastically."""
    return bool(section.get("bf16", {}).get(MASTERS_WORDS[0]))


MASTERS_WORDS = ("bf16_master_weights_and_grads", "bf16_optimizer_states")


def _check_bf16_masters(section: dict[str, Any]) -> None:
    """Both words or neither, and only where DeepSpeed heeds them.

    Raises:
        UserError: naming the word that is missing or in the way.
    """
    given = section.get("bf16", {})
    said = [typed(given.get(word, False), bool, f"bf16.{word}") for word in MASTERS_WORDS]
    if not any(said):
        return
    if not all(said):
        missing = MASTERS_WORDS[said.index(False)]
        raise UserError(f"bf16.{missing}: must be true where bf16.{MASTERS_WORDS[said.index(True)]} is")
    if not given.get("enabled"):
        raise UserError(f"bf16.{MASTERS_WORDS[0]}: bf16.enabled is not true")
    stage = section.get("zero_optimization", {}).get("stage", 0)
    if stage == 0:
        raise UserError(f"bf16.{MASTERS_WORDS[0]}: not at ZeRO-0; set zero_optimization.stage to 2 (legal on one GPU)")
    if stage == 1 and section.get("data_types", {}).get("grad_accum_dtype") != "bf16":
        raise UserError(
            f"bf16.{MASTERS_WORDS[0]}: at ZeRO-1 DeepSpeed sums fp32 gradients in a wrapper that keeps fp32 masters; set "
            "zero_optimization.stage to 2, or data_types.grad_accum_dtype to bf16"
        )


def _say(error: pydantic.ValidationError, section: dict[str, Any]) -> str:
    """One of pydantic's complaints in our words: the section is recognised by the fields it is made of."""
    first = error.errors()[0]
    word = ".".join(str(part) for part in first["loc"])
    model = next((m for m in _models(DeepSpeedConfigModel) if m.__name__ == error.title), None)
    fields = list(model.model_fields) if model else []
    place = next((name for name, value in section.items() if isinstance(value, dict) and word in value), error.title)
    if first["type"] == "extra_forbidden":
        return f"{place}.{word}: unknown key{nearest(word, fields)}; allowed: {', '.join(sorted(fields))}"
    return f"{place}.{word}: {first['msg'].lower()}, found {first.get('input')!r}"


def _models(base: type[pydantic.BaseModel]) -> Iterator[type[pydantic.BaseModel]]:
    for model in base.__subclasses__():
        yield model
        yield from _models(model)
