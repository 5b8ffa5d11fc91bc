"""Time of one optimizer step on a model's own flat tensors, beside torch's and DeepSpeed's optimizers, and its floor.

    python benchmarks/optimizer.py [--sizes ViT-S/16 ViT-G/14] [--device cpu] [--elements N] [--ranks 1] [--rounds 7]
        [--threads 1 2] [--dtype fp32 bf16] [--json PATH]

The flats are those DeepSpeed hands the first of `--ranks` ranks at ZeRO-1 or 2 (vitds.optim.groups.flats_of), as many of
them as fit into `--elements`. The candidates take turns on the same weights and gradients (benchmarks/runner.py); ratios
are to torch's fused AdamW. GB/s counts what a step must move: weights and state read and written once, gradients read
once, by a factored optimizer twice, because no weight can move before all of a parameter's squares are summed. `of copy`
is that rate over the rate of a copy in the same rounds: 1.00 is the floor. torch's Adafactor sees the parameters in
their shapes, which ZeRO would not give it, and keeps no momentum.

The last table counts the launches of our kernels on all flats of the model, without running them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from runner import MILLISECONDS, Candidate, Column, Row, Table, compare, report

from vitds.layout import Flat, Fragment
from vitds.models import ModelSection, ViTForImageClassification, build_config
from vitds.optim import (
    HalfPrecisionMomentumAdam,
    HalfPrecisionMomentumSGD,
    LayoutOptimizer,
    ModifiedAdafactor,
    kernels,
)
from vitds.optim.groups import build_groups, flats_of

CLASSES = {"ViT-g/14": 29593, "ViT-G/14": 29593}
"""Of JFT-3B, for the models of the paper; others have ImageNet's 1000."""
BASELINE = "torch AdamW, fused"
OURS: tuple[type[LayoutOptimizer], ...] = (HalfPrecisionMomentumAdam, ModifiedAdafactor, HalfPrecisionMomentumSGD)
COLUMNS = [
    MILLISECONDS, Column("bytes/s", "GB/s", ".1f", 1e-9), Column("share", "of copy", ".2f"),
    Column("state", "state B/param", ".2f"), Column("launches", "launches", ".0f"),
]  # fmt: skip


def layouts(variant: str, ranks: int) -> list[tuple[str, list[Fragment]]]:
    """What lies in each flat of the first rank, with its group's name, the largest group's flats first."""
    classes = CLASSES.get(variant, 1000)
    with torch.device("meta"):
        model = ViTForImageClassification(build_config(ModelSection(variant=variant, num_classes=classes)))
    views, sizes = model.factored_views(), {name: torch.Size(shape).numel() for name, shape in model.shapes.items()}
    groups = build_groups(
        model.shapes, lr=1e-3, weight_decay=0.03, head_weight_decay=3.0, decay_patterns=model.decay_patterns()
    )
    found = []
    for group in sorted(groups, key=lambda group: -group.numel):
        for names in flats_of(group.names, sizes, ranks):
            here, offset = -(-sum(sizes[name] for name in names) // ranks), 0
            fragments = []
            for name in names:
                numel = min(sizes[name], here - offset)
                fragments.append(Fragment(name, model.shapes[name], views[name], 0, numel, offset if numel else 0))
                offset += numel
            found.append((group.name, fragments))
    return found


def made(fragments: list[Fragment], device: str, dtype: torch.dtype) -> Flat:
    """A flat with random values and gradients; on the meta device with none."""
    size = sum(f.numel for f in fragments)
    tensor = torch.empty(size, device=device).normal_(0, 0.02).to(dtype).requires_grad_()
    tensor.grad = torch.empty(size, device=device).normal_(0, 1e-3).to(dtype)
    return Flat(tensor, tuple(fragments))


def taken(layout: list[tuple[str, list[Fragment]]], most: int) -> list[list[Fragment]]:
    """The first flats of at most so many elements together; of the first one, if it is too large, its first parameters."""
    first = layout[0][1]
    while len(first) > 1 and sum(f.numel for f in first) > most:
        first = first[:-1]
    found, room = [first], most - sum(f.numel for f in first)
    for _, fragments in layout[1:] if len(first) == len(layout[0][1]) else ():
        room -= sum(f.numel for f in fragments)
        if room < 0:
            break
        found.append(fragments)
    return found


def as_parameters(flats: list[Flat]) -> list[torch.Tensor]:
    """The whole parameters in their own shapes, in the flats' memory."""
    found = []
    for flat in flats:
        for f in flat.fragments:
            if f.numel == f.total:
                assert flat.tensor.grad is not None
                parameter = f.of(flat.tensor.detach()).view(f.shape).requires_grad_()
                parameter.grad = f.of(flat.tensor.grad).view(f.shape)
                found.append(parameter)
    return found


def bound(cls: type[LayoutOptimizer], flats: list[Flat], which: str = "auto") -> LayoutOptimizer:
    optimizer = cls([{"params": [flat.tensor]} for flat in flats], lr=1e-4, weight_decay=0.03)  # type: ignore[call-arg]
    optimizer.kernels = which
    optimizer.bind(flats)
    return optimizer


def deepspeed_adam(flats: list[Flat]) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    tensors = [flat.tensor for flat in flats]
    cls = FusedAdam if tensors[0].is_cuda else DeepSpeedCPUAdam
    return cls(tensors, lr=1e-4, weight_decay=0.03)


def optimizers(flats: list[Flat], device: str) -> dict[str, Callable[[], torch.optim.Optimizer]]:
    """How to build each candidate; what cannot be built becomes a row that says so."""
    tensors = [flat.tensor for flat in flats]
    given: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.03}
    found: dict[str, Callable[[], torch.optim.Optimizer]] = {
        BASELINE: lambda: torch.optim.AdamW(tensors, fused=True, **given),
        "torch AdamW, foreach": lambda: torch.optim.AdamW(tensors, foreach=True, **given),
        f"DeepSpeed {'FusedAdam' if device != 'cpu' else 'CPUAdam'}": lambda: deepspeed_adam(flats),
        "torch Adafactor, whole": lambda: torch.optim.Adafactor(as_parameters(flats), foreach=True, **given),
    }
    for cls in OURS:
        found[cls.__name__] = lambda cls=cls: bound(cls, flats)
        if device != "cpu":
            found[f"{cls.__name__}, torch path"] = lambda cls=cls: bound(cls, flats, "torch")
    return found


class Turn:
    """An optimizer that is built when its first turn comes.

    Args:
        build: makes it.
        flats: what it steps.
        reads: how often it must read a gradient.
    """

    def __init__(self, build: Callable[[], torch.optim.Optimizer], flats: list[Flat], reads: int) -> None:
        self.build, self.flats, self.reads = build, flats, reads
        self.optimizer: torch.optim.Optimizer | None = None
        self.launches: int | None = None

    def __call__(self) -> None:
        if self.optimizer is None:
            self.optimizer = self.build()
            self.optimizer.step()  # makes the state
            self.launches = launches_of(self.optimizer) if self.flats[0].tensor.is_cuda else None
        self.optimizer.step()

    @property
    def state(self) -> int:
        """Bytes of state that a step reads and writes."""
        if self.optimizer is None:
            return 0
        held = [t for state in self.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        return sum(t.nbytes for t in held)

    @property
    def bytes(self) -> int:
        """What a step must move."""
        return sum((2 + self.reads) * flat.tensor.nbytes for flat in self.flats) + 2 * self.state


def launches_of(optimizer: torch.optim.Optimizer) -> int:
    """Kernels and memory operations that one step starts on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        optimizer.step()
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages() if event.self_device_time_total > 0)


def steps(title: str, flats: list[Flat], device: str, rounds: int) -> Table:
    """The candidates by turns, and a copy among them."""
    elements = sum(flat.tensor.numel() for flat in flats)
    source = torch.empty(min(elements, 2**28), device=device).normal_()
    target = torch.empty_like(source)
    turns = {
        name: Turn(build, flats, 2 if "Adafactor" in name else 1) for name, build in optimizers(flats, device).items()
    }

    def copy() -> None:
        target.copy_(source)

    candidates = [Candidate("copy", copy, amounts={"bytes": 2 * source.nbytes})]
    candidates += [Candidate(name, turn, baseline=BASELINE) for name, turn in turns.items()]
    table = compare(title, candidates, rounds=rounds, warmup=2, columns=COLUMNS, device=device)
    copied = table["copy"].figures.get("bytes/s")
    for name, turn in turns.items():
        figures = table[name].figures
        if figures.get("seconds"):
            figures["bytes/s"] = turn.bytes / figures["seconds"]
            figures["share"] = figures["bytes/s"] / copied if copied else None
            figures |= {"state": turn.state / elements, "launches": turn.launches, "bytes": turn.bytes}
    return table


def counted(variant: str, layout: list[tuple[str, list[Fragment]]]) -> Table:
    """Launches of our kernels on every flat of a model, counted on the meta device: nothing is computed."""
    from vitds.optim.kernels import elementwise, factored

    flats = [made(fragments, "meta", torch.float32) for _, fragments in layout]
    rows = []
    for cls in OURS:
        programs: list[int] = []

        def note(kernel: Any, number: int, *_: Any, into: list[int] = programs, **__: Any) -> None:
            into += [number] if number else []

        with (
            mock.patch.object(elementwise, "launch", note),
            mock.patch.object(factored, "launch", note),
            mock.patch.object(kernels, "chosen", return_value=True),
        ):
            bound(cls, flats).step()
        most = len(programs) / len(flats)
        figures = {"flats": len(flats), "launches": len(programs), "each": most, "programs": sum(programs)}
        rows.append(Row(cls.__name__, figures=figures))
    columns = [Column("flats", "flats", ".0f"), Column("launches", "launches a step", ".0f"),
               Column("each", "a flat", ".1f"), Column("programs", "programs", ",.0f")]  # fmt: skip
    total = sum(flat.tensor.numel() for flat in flats)
    return Table(f"{variant}: launches of our Triton kernels on all flats ({total:,} elements), counted", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["ViT-S/16", "ViT-G/14"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--elements", type=int, help="of the flats together; default 2^29, on a CPU 2^25")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument(
        "--dtype", nargs="+", default=["fp32"], choices=["fp32", "bf16"], help="of weights and gradients"
    )
    parser.add_argument("--json")
    arguments = parser.parse_args()
    device = arguments.device
    most = arguments.elements or (2**25 if device == "cpu" else 2**29)
    tables = []
    for variant in arguments.sizes:
        layout = layouts(variant, arguments.ranks)
        for dtype in arguments.dtype:
            kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
            flats = [made(fragments, device, kind) for fragments in taken(layout, most)]
            elements = sum(flat.tensor.numel() for flat in flats)
            for threads in arguments.threads if device == "cpu" else [torch.get_num_threads()]:
                torch.set_num_threads(threads)
                said = f", {threads} threads" if device == "cpu" else ""
                title = f"{variant}: {len(flats)} of {len(layout)} flats, {elements:,} elements in {dtype}{said}"
                tables.append(steps(title, flats, device, arguments.rounds))
            del flats
        if not kernels.trouble_with(torch.device("meta")).startswith("triton is not installed"):
            tables.append(counted(variant, layout))
    report(tables, arguments.json, device)


if __name__ == "__main__":
    main()
