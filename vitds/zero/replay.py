"""Where the first number that is not finite comes from: a step's batches once more, with every module and gradient watched.

Nothing of it stays. The gradients of the replay are thrown away like those of a dropped batch, by DeepSpeed's own step,
so that it works, and leaves the engine as it was, under every wrapper that `TrainingEngine.step` knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vitds import dist
from vitds.data import Batch, to_model_range
from vitds.zero.engine import TrainingEngine

SHOWN_IMAGES = 8


@dataclass(frozen=True)
class Culprit:
    """The first place that is not finite, and the micro batch with which it was met."""

    what: str
    """weight; images; output (of a module, in forward order); loss; gradient (of a parameter, in backward order, as
    this rank alone has it)."""
    name: str
    """Of the parameter or module."""
    rank: int
    micro_batch: int
    """Of that rank's micro batches of the step, from 0."""
    positions: list[int]
    """Of the micro batch's images in the stream."""
    ranks: list[int]
    """All on which something was not finite."""

    def __str__(self) -> str:
        place = f"the {self.what}" + (f" of {self.name}" if self.name and self.what != "weight" else f" {self.name}")
        others = f" (also on {len(self.ranks) - 1} other rank(s))" if len(self.ranks) > 1 else ""
        return f"{place.rstrip()} is the first that is not finite, on rank {self.rank}{others}, micro batch {self.micro_batch}"


def first_nonfinite(engine: TrainingEngine, batches: Sequence[Batch]) -> Culprit | None:
    """The place where a step's batches first meet a number that is not finite. Collective, between two steps.

    Args:
        engine: its weights, state, counters and loss scale stay as they are.
        batches: this rank's micro batches of one step.

    Returns:
        The same on every rank; None when all is finite this time: only the sum over micro batches or ranks
        overflowed, compiled code computed something else, or the hardware made a mistake.
    """
    assert engine.deepspeed.micro_steps % engine.deepspeed.gradient_accumulation_steps() == 0, "inside an accumulation"
    dtype = engine.deepspeed.get_data_types()[0]  # a weight finite as fp32 may not be in 16 bits
    weight = next((s.name for s in engine.master_shards() if not _is_finite(s.data.to(dtype))), None)
    found: tuple[int, str, str, list[int]] | None = None
    # Compiled code calls no hooks.
    with torch.compiler.set_stance("force_eager"), _watched(engine) as seen:
        for number, batch in enumerate(batches):
            seen.clear()
            images = to_model_range(batch.images, engine.device)
            if not _is_finite(images):
                seen.append(("images", ""))
            loss = engine(images, labels=batch.labels.to(engine.device)).loss
            engine.backward(loss)
            engine.step(drop=True)
            if seen and found is None:
                found = number, *seen[0], batch.positions
    everywhere = dist.all_objects((weight, found))
    weights = [name for name, _ in everywhere if name is not None]
    met = [(what[0], rank) for rank, (_, what) in enumerate(everywhere) if what is not None]
    if not met:
        return None
    _, rank = min(met)
    number, what, name, positions = everywhere[rank][1]
    if weights:  # whatever followed, followed from this
        what, name = "weight", min(weights, key=list(engine.partitions.parameters).index)
    return Culprit(what, name, rank, number, positions, [rank for _, rank in met])


def explain(
    engine: TrainingEngine,
    batches: Sequence[Batch],
    keys: Callable[[Sequence[int]], list[str]],
    event: Callable[..., None],
    step: int,
) -> str:
    """Replay a step's batches, write what was found as event "not finite", and say it. Collective, between two steps.

    Args:
        engine: see `first_nonfinite`.
        batches: this rank's micro batches of the step.
        keys: `TrainLoader.keys`.
        event: `RunDirectory.event`.
        step: updates made.
    """
    culprit = first_nonfinite(engine, batches)
    if culprit is None:
        event("not finite", step=step, found=False)
        return "a replay of the batch met only finite numbers: a sum overflowed, or the hardware made a mistake"
    names = dist.broadcast_object(keys(culprit.positions) if dist.is_main() else None)
    event("not finite", step=step, found=True, **asdict(culprit), images=names)
    shown = ", ".join(names[:SHOWN_IMAGES]) + (f" and {len(names) - SHOWN_IMAGES} more" if names[SHOWN_IMAGES:] else "")
    return f"{culprit} of images {shown}"


@contextmanager
def _watched(engine: TrainingEngine) -> Iterator[list[tuple[str, str]]]:
    """While open, every module's output and every parameter's gradient that is not finite is added to the yielded list
    as (what, name), in the order in which they arise."""
    seen: list[tuple[str, str]] = []

    def output_of(name: str) -> Callable[..., None]:
        def look(module: Any, inputs: Any, output: Any) -> None:
            if not all(map(_is_finite, _tensors(output))):
                seen.append(("output", name) if name else ("loss", ""))

        return look

    def gradient_of(name: str) -> Callable[[torch.Tensor], None]:
        def look(gradient: torch.Tensor) -> None:
            if not _is_finite(gradient):
                seen.append(("gradient", name))

        return look

    module = engine.deepspeed.module
    hooks = [each.register_forward_hook(output_of(name)) for name, each in module.named_modules()]
    hooks += [p.register_hook(gradient_of(name)) for name, p in module.named_parameters() if p.requires_grad]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _is_finite(tensor: torch.Tensor) -> bool:
    # Detached, or it would add to what activation checkpointing finds saved.
    return bool(torch.isfinite(tensor.detach()).all())
