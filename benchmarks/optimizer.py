"""Time of one optimizer step on the flat tensors that ZeRO hands an optimizer, beside torch.optim.AdamW(foreach=True).

    python benchmarks/optimizer.py [--threads 1 2] [--sizes ViT-S/16 ViT-L/16] [--steps 7] [--device cpu]

The candidates take turns within each round, so that a noisy machine disturbs them alike; medians are printed, and the
ratio to AdamW in the same run (below 1 is faster). GB/s counts what a step must move at least: weights and state read
and written, gradient read, once each.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from vitds.layout import Flat, Fragment
from vitds.optim.adafactor import ModifiedAdafactor
from vitds.optim.adam import HalfPrecisionMomentumAdam
from vitds.optim.sgd import HalfPrecisionMomentumSGD

SIZES = {"ViT-S/16": (384, 12, 1536, 6, 16), "ViT-L/16": (1024, 24, 4096, 16, 16), "ViT-g/14": (1408, 40, 6144, 16, 14)}


def views_of(
    width: int, depth: int, mlp: int, heads: int, patch: int
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The views of the kernels and of everything else, as the two groups of a model without classifier."""
    per_head = width // heads
    block_kernels = [(3, heads, per_head, width), (width, heads, per_head), (mlp, width), (width, mlp)]
    block_rest = [(3 * width,), (width,), (mlp,), (width,), (width,), (width,), (width,), (width,)]
    rest = [(width,), (1, (224 // patch) ** 2, width), (width,), (width,)]
    return [(width, 3, patch, patch), *block_kernels * depth], [*rest, *block_rest * depth]


def flat_of(views: list[tuple[int, ...]], device: str, world_size: int) -> Flat:
    """Rank 0's part of these parameters, concatenated and cut in `world_size`; random values and gradients."""
    totals = [torch.Size(view).numel() for view in views]
    size = -(-sum(totals) // world_size)
    fragments, offset = [], 0
    for i, (view, total) in enumerate(zip(views, totals, strict=True)):
        numel = min(total, max(0, size - offset))
        fragments.append(Fragment(f"p{i}", view, view, 0, numel, offset if numel else 0))
        offset += numel
    tensor = torch.randn(offset, device=device).mul_(0.02).requires_grad_()
    tensor.grad = torch.randn(offset, device=device).mul_(1e-3)
    return Flat(tensor, tuple(fragments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sizes", nargs="+", default=["ViT-S/16", "ViT-L/16"], choices=SIZES)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {arguments.device}; a step in ms (median of {arguments.steps}), ratio to AdamW")
    for size in arguments.sizes:
        flats = [flat_of(views, arguments.device, arguments.world_size) for views in views_of(*SIZES[size])]
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            compare(size, flats, threads, arguments.steps)


def compare(size: str, flats: list[Flat], threads: int, steps: int) -> None:
    """Print one line per optimizer."""
    groups = [{"params": [flats[0].tensor], "weight_decay": 0.03}, {"params": [flats[1].tensor], "weight_decay": 0.0}]
    optimizers: dict[str, torch.optim.Optimizer] = {
        "AdamW(foreach=True)": torch.optim.AdamW([dict(group) for group in groups], lr=1e-3, foreach=True)
    }
    for cls in (HalfPrecisionMomentumAdam, ModifiedAdafactor, HalfPrecisionMomentumSGD):
        ours = cls([dict(group) for group in groups], lr=1e-3)
        ours.bind(flats)
        optimizers[cls.__name__] = ours
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for round_number in range(steps + 1):
        for name, optimizer in optimizers.items():
            begin = time.perf_counter()
            optimizer.step()
            if flats[0].tensor.is_cuda:
                torch.cuda.synchronize()
            if round_number:  # the first allocates state
                times[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in times.items()}
    num_parameters = sum(flat.tensor.numel() for flat in flats)
    for name, median in medians.items():
        state = [t for s in optimizers[name].state.values() for t in s.values() if torch.is_tensor(t)]
        state_bytes = sum(t.numel() * t.element_size() for t in state)
        moved = 12 * num_parameters + 2 * state_bytes
        print(
            f"{size:9} {num_parameters / 1e6:6.1f} M  {threads} threads  {name:26} {median * 1e3:8.2f} ms"
            f"  ×{median / medians['AdamW(foreach=True)']:.2f}  {moved / median / 1e9:5.1f} GB/s"
            f"  {state_bytes / num_parameters:.2f} B state/parameter"
        )


if __name__ == "__main__":
    main()
