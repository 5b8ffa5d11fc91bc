"""The memory forecast against tensors: what a block keeps, and whole steps of real engines under every ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.launching import ROOT, ranks
from tests.planning.measured import chosen
from vitds.models import ModelSection, build_config
from vitds.models.layers import Block
from vitds.planning.activations import activations
from vitds.planning.workload import workload_of_shape

ABOVE, BELOW = 0.08, 0.03
"""The forecast may be so much above what was measured, and so much below."""
STATISTICS = 0.01
"""On CPUs the norms' statistics are kept in 16 bits, elsewhere in fp32."""
ADAFACTOR = {"type": "ModifiedAdafactor", "params": {"lr": 1e-3}}


def saved(block: Block, x: torch.Tensor) -> int:
    """Bytes of the storages that autograd keeps, each once, without the block's parameters and the random state."""
    parameters = {p.untyped_storage()._cdata for p in block.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters and tensor.dtype != torch.uint8:
            found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x)
    return sum(storage.nbytes() for storage in found.values())


def forecast(
    dtype: torch.dtype, policy: str, compiled: bool, width: int, mlp: int, heads: int, images: int, side: int
) -> int:
    config = build_config(
        ModelSection(width=width, depth=1, mlp_dim=mlp, num_heads=heads, patch_size=4, image_size=4 * side)
    )
    section = {"bf16": {"enabled": dtype == torch.bfloat16}, "zero_optimization": {"stage": 2}}
    workload = workload_of_shape(
        config, ADAFACTOR, section, micro_batch=images, policy=policy, compiled=compiled, device="cpu"
    )
    return sum(activations(workload).kept(1).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(64, 256, 2, 8, 8), (96, 160, 3, 2, 16), (128, 1024, 8, 4, 4)], ids=str)
@pytest.mark.parametrize("policy", ["none", "full"])
def test_a_block_keeps_what_is_forecast(dtype: torch.dtype, shape: tuple[int, ...], policy: str):
    width, mlp, heads, images, side = shape
    block = Block(width, mlp, heads).to(dtype)
    block.recompute = policy
    x = torch.randn(images, side * side, width, dtype=dtype, requires_grad=True)
    assert forecast(dtype, policy, False, *shape) == pytest.approx(saved(block, x), rel=STATISTICS)


@pytest.mark.parametrize("policy", ["none", "full", "selective"])
def test_a_compiled_block_keeps_what_is_forecast(policy: str):
    """By the partitioner that inductor uses, too; what inductor does to the code is not ours to test."""
    shape = (64, 256, 2, 8, 8)
    width, mlp, heads, images, side = shape
    block = Block(width, mlp, heads)
    block.recompute = policy
    torch._dynamo.reset()
    block.compile(backend="aot_eager_decomp_partition")
    x = torch.randn(images, side * side, width, requires_grad=True)
    assert forecast(torch.float32, policy, True, *shape) == pytest.approx(saved(block, x), rel=STATISTICS)


@pytest.mark.parametrize("number", [1, 2])
def test_whole_steps_need_what_is_forecast(number: int, tmp_path: Path):
    """Never much less than was measured, so that "it fits" is true, and not much more. -s prints the table."""
    done = ranks(number, ROOT / "tests" / "planning" / "measured.py", str(tmp_path), timeout=900)
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "measured.json").read_text())
    assert found.keys() == chosen(number).keys()
    errors = {name: cell["forecast"]["peak"] / cell["measured"]["peak"] - 1 for name, cell in found.items()}
    for name, error in errors.items():
        print(
            f"{number} rank(s)  {name:36} {found[name]['measured']['peak'] / 2**20:8.2f} MiB measured, forecast {error:+.1%}"
        )
    assert {n: f"{e:+.1%}" for n, e in errors.items() if not -BELOW <= e <= ABOVE} == {}
