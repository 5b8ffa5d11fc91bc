"""Forward and backward of attention as the model calls it, by each of torch's kernels: views of a fused QKV product,
heads of 104 (ViT-G/14), 88 (ViT-g/14) and 64.

    python benchmarks/attention.py [--device cuda] [--shapes 64,256,16,104 …] [--dtype bf16] [--rounds 7]

TFLOP/s counts the two products of the forward pass and the four of the backward pass (not what fused kernels compute
again). What is fastest here is for the run file's vitds.train.attention.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from runner import MILLISECONDS, Candidate, Column, Table, compare, report
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
SHAPES = {
    "cuda": ("64,256,16,104", "64,256,16,88", "256,196,6,64"),  # G/14, g/14 and S/16 at 224 pixels
    "cpu": ("2,256,2,104", "2,256,2,88", "4,196,6,64"),
}


def once(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> Callable[[], None]:
    """A forward and backward pass of (B, N, H, d), from the fused product's output to its gradient."""
    batch, tokens, heads, width = shape
    fused = torch.randn(batch, tokens, 3 * heads * width, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(batch, tokens, heads * width, device=device, dtype=dtype)

    def turn() -> None:
        q, k, v = fused.view(batch, tokens, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, heads * width)
        out.backward(gradient)
        fused.grad = None

    return turn


def table_of(text: str, dtype: torch.dtype, device: str, rounds: int, repeat: int) -> Table:
    """One shape, all kernels."""
    batch, tokens, heads, width = shape = tuple(map(int, text.split(",")))
    turn = once(shape, dtype, device)
    flops = 6 * 2 * batch * heads * tokens**2 * width * repeat

    def candidate(name: str) -> Candidate:
        def run() -> None:
            if (kernel := KERNELS[name]) is None:
                return times()
            with sdpa_kernel([kernel]):
                times()

        def times() -> None:
            for _ in range(repeat):
                turn()

        return Candidate(name, run, "default" if name != "default" else None, {"flops": flops, "passes": repeat})

    title = f"attention, {batch} images, {tokens} tokens, {heads} heads of {width}, {str(dtype).removeprefix('torch.')}"
    columns = (Column("passes/s", "passes/s", ".1f"), MILLISECONDS, Column("flops/s", "TFLOP/s", ".2f", 1e-12))
    return compare(title, [candidate(name) for name in KERNELS], rounds=rounds, columns=columns, device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", nargs="+", metavar="B,N,H,d")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeat", type=int, default=None, help="passes in a turn; default 20 on a GPU, 1 on a CPU")
    parser.add_argument("--json", default="benchmarks/attention.json")
    arguments = parser.parse_args()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[arguments.dtype]
    repeat = arguments.repeat or (1 if arguments.device == "cpu" else 20)
    shapes = arguments.shapes or SHAPES["cpu" if arguments.device == "cpu" else "cuda"]
    tables = [table_of(shape, dtype, arguments.device, arguments.rounds, repeat) for shape in shapes]
    report(tables, arguments.json, arguments.device)


if __name__ == "__main__":
    main()
