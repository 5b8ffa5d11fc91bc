"""Triton's kernels compute what the equations and the torch path do, in a few launches, whatever is cut where.

On a machine without a GPU the kernels are interpreted (tests/optim/conftest.py), with small tiles so that small
parameters need several; test_compiled.py has them compiled.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.optim.reference import Run, errors, full_run
from vitds.layout import Flat, Fragment, Shard
from vitds.optim import OPTIMIZERS, base, kernels
from vitds.optim.factoring import Factored, factoring_of
from vitds.optim.rounding import name_key, stochastically, stream_of

pytest.importorskip("triton")

SHAPES: dict[str, tuple[int, ...]] = {
    "qkv": (2, 3, 35, 40), "proj": (40, 3, 34), "mlp": (72, 40), "square": (33, 33), "batched": (2, 33, 3, 34, 2),
    "wide": (34, 150), "norm": (40,), "one": (1,), "patch": (36, 3, 4, 4),
}  # fmt: skip
STEPS, LR, DECAY = 2, 1e-2, 0.1
VARIANTS = [
    ("HalfPrecisionMomentumAdam", {}),
    ("HalfPrecisionMomentumSGD", {}),
    ("ModifiedAdafactor", {}),
    ("ModifiedAdafactor", {"clipping_threshold": 0.5, "beta2_cap": 0.9}),
]
IDS = ["adam", "sgd", "adafactor", "clipping"]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    pytest.importorskip("triton")
    from vitds.optim.kernels import elementwise, tables

    monkeypatch.setattr(tables, "ROWS", 48)
    monkeypatch.setattr(tables, "RUN", 2048)
    monkeypatch.setattr(tables, "GATHERED", 1024)
    monkeypatch.setattr(elementwise, "BLOCK", 512)


def values(seed: int, scale: float) -> dict[str, torch.Tensor]:
    """Of sizes that differ along every axis, so that a factor in the wrong place shows."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in SHAPES.items():
        found[name] = torch.randn(shape, generator=generator) * scale
        for axis, size in enumerate(shape):
            sizes = torch.logspace(-0.5, 0.5, size).roll(axis)
            found[name] *= sizes.view([-1 if a == axis else 1 for a in range(len(shape))])
    return found


def weights() -> dict[str, torch.Tensor]:
    """First values, all of one size, so that fp32 resolves how far each moves."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in SHAPES.items()}


def cut(seed: int, ends: bool = True) -> list[Fragment]:
    """A flat of pieces in random order, with gaps; cut at any element if `ends`, else whole."""
    rng = random.Random(seed)
    names, fragments, offset = [*SHAPES], [], rng.randrange(20)
    rng.shuffle(names)
    for name in names:
        total = torch.Size(SHAPES[name]).numel()
        start, end = sorted(rng.randint(0, total) for _ in range(2)) if ends else (0, total)
        fragments.append(Fragment(name, SHAPES[name], SHAPES[name], start, end - start, offset if end > start else 0))
        offset += end - start + rng.randrange(10)
    return fragments


def flat_of(fragments: list[Fragment], given: dict[str, torch.Tensor], device: Any, dtype: torch.dtype) -> Flat:
    """What lies between the fragments is not a number."""
    size = max(f.offset + f.numel for f in fragments) + 5
    return Flat(laid_out(fragments, given, size).to(device, dtype), tuple(fragments))


def laid_out(fragments: list[Fragment], given: dict[str, torch.Tensor], size: int) -> torch.Tensor:
    tensor = torch.full((size,), float("nan"))
    for f in fragments:
        f.of(tensor).copy_(given[f.name].reshape(-1)[f.start : f.start + f.numel])
    return tensor


def stepped(
    name: str, hyper: dict[str, Any], which: str, fragments: list[Fragment], device: Any = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, Flat]:  # fmt: skip
    """A flat after STEPS updates; its gradients have its own dtype."""
    flat = flat_of(fragments, weights(), device, dtype)
    optimizer: Any = OPTIMIZERS[name]([flat.tensor], lr=rate(name), weight_decay=DECAY * LR / rate(name), **hyper)
    optimizer.kernels = which
    optimizer.bind([flat])
    for step in range(STEPS):
        flat.tensor.grad = laid_out(fragments, values(1 + step, 1e-3), flat.tensor.numel()).to(device, dtype)
        optimizer.step()
    return optimizer, flat


def rate(name: str) -> float:
    """SGD's steps are as small as the gradients."""
    return LR * (1000 if "SGD" in name else 1)


@pytest.mark.parametrize(("name", "hyper"), VARIANTS, ids=IDS)
def test_a_flat_of_whole_parameters_matches_the_equations(name, hyper, kernel_device):
    _, flat = stepped(name, hyper, "triton", cut(0, ends=False), kernel_device)
    decay = {n: {"weight_decay": DECAY * LR / rate(name)} for n in SHAPES}
    grads = [values(1 + step, 1e-3) for step in range(STEPS)]
    run: Run = full_run(name, weights(), {}, grads, decay, 0, [rate(name)] * STEPS, **hyper)
    found = {f.name: f.of(flat.tensor).view(f.shape) for f in flat.fragments}
    worst = {n: (e.decided, e.doubtful) for n, e in errors(found, weights(), run).items()}
    assert not {n: e for n, e in worst.items() if e[0] > 1e-5 or e[1] > 2e-2}, worst
    assert flat.tensor.isnan().sum() == flat.tensor.numel() - sum(f.numel for f in flat.fragments), (
        "padding is left alone"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "hyper"), VARIANTS, ids=IDS)
def test_cut_anywhere_they_do_what_the_torch_path_does(name, hyper, dtype, kernel_device):
    """As far as a piece alone tells: factors of what is here. bf16 weights get the same random bits on both paths."""
    fragments = cut(len(name) + len(hyper))
    reference, theirs = stepped(name, hyper, "torch", fragments, dtype=dtype)
    optimizer, ours = stepped(name, hyper, "triton", fragments, kernel_device, dtype)
    for f in fragments:
        wanted, found = f.of(theirs.tensor).float(), f.of(ours.tensor).float().cpu()
        near = torch.isclose(found, wanted, rtol=1e-5, atol=1e-6)
        assert found.isfinite().all()
        assert near.float().mean() > 0.99 if f.numel > 200 else near.sum() >= f.numel - 2, f.name
        assert torch.allclose(found, wanted, rtol=2**-6, atol=1e-4), "a bit may fall to the other side: a bf16 step"
    shards: list[Shard] = optimizer.state_shards()
    for mine, other in zip(shards, reference.state_shards(), strict=True):
        assert (mine.name, mine.start, mine.data.dtype) == (other.name, other.start, other.data.dtype)
        found, wanted = mine.data.cpu().float(), other.data.float()
        scale = float(wanted.abs().max()) if wanted.numel() else 0.0
        tolerance = (1e-2, 1e-6 * scale) if mine.name.endswith("exp_avg") else (1e-5, 1e-20)
        assert torch.allclose(found, wanted, *tolerance), mine.name


def test_the_same_step_gives_the_same_bits(kernel_device):
    name, hyper = VARIANTS[-1]
    few = [f for f in cut(4) if f.name in ("qkv", "norm")]
    (first, flat), (second, again) = (stepped(name, hyper, "triton", few, kernel_device) for _ in range(2))
    assert torch.equal(flat.tensor.nan_to_num(), again.tensor.nan_to_num())
    for a, b in zip(first.state_shards(), second.state_shards(), strict=True):
        assert torch.equal(a.data, b.data)


def test_sums_of_pieces_add_up_to_those_of_the_whole(kernel_device):
    """Ranks add up what the kernels leave: so the cut may change its rounding only."""
    from vitds.optim.kernels import factored, tables

    grads = values(5, 1.0)
    for name in ("qkv", "batched", "mlp", "proj"):
        axes = factoring_of(SHAPES[name], 32)
        assert axes is not None
        total = torch.Size(SHAPES[name]).numel()
        size = axes.num_over_y + axes.num_over_x
        sums = torch.zeros(size, device=kernel_device)
        bounds = [0, *sorted(random.Random(name).randint(0, total) for _ in range(3)), total]
        for start, end in pairwise(bounds):
            f = Fragment(name, SHAPES[name], SHAPES[name], start, end - start, start % 5)
            flat = flat_of([f], grads, kernel_device, torch.float32)
            made = tables.factor_tables(flat, [Factored(0, f, axes, [], 0)], 0, tables.Slots())
            here = torch.zeros(size, device=kernel_device)
            factored.sum_squares(made, flat.tensor, here)
            sums += here
        squares = grads[name].double().square().view(axes.batch, axes.x, axes.middle, axes.y, axes.trailing)
        wanted = torch.cat([squares.sum(3).flatten(), squares.sum(1).flatten()])
        assert torch.allclose(sums.cpu().double(), wanted, rtol=2e-6), name


def test_a_tile_is_laid_over_every_element_once():
    from vitds.optim.kernels import tables

    for seed in range(20):
        flat = flat_of(cut(seed), initial_of_shapes(), "cpu", torch.float32)
        sections = [
            Factored(i, f, axes, [], 0)
            for i, f in enumerate(flat.fragments)
            if (axes := factoring_of(f.view, 32)) is not None
        ]
        slots = tables.Slots()
        others = {i: 0 for i in range(len(flat.fragments)) if i not in {s.index for s in sections}}
        runs, made = tables.runs(flat, 0, others, slots), tables.factor_tables(flat, sections, 0, slots)
        seen = torch.zeros(flat.tensor.numel(), dtype=torch.int64)
        for place, low, high, *_ in runs.tolist():
            seen[place + low : place + high] += 1
        taken = runs[:, 7].tolist()
        for table, aligned, unit in made.tiles():
            for place, element, rows, columns, stride, spacing, *rest in table.tolist():
                x, y = torch.meshgrid(torch.arange(rows) * stride, torch.arange(columns) * spacing, indexing="ij")
                here = (element + x + y >= rest[6]) & (element + x + y < rest[7])
                assert not aligned or (here.all() and place % 8 == stride % 8 == columns % 8 == 0)
                assert not unit or spacing == 1
                seen[(place + x + y)[here]] += 1
                taken.append(rest[10])
        wanted = torch.zeros_like(seen)
        for f in flat.fragments:
            f.of(wanted).add_(1)
        assert torch.equal(seen, wanted)
        assert sorted(taken) == [*range(slots.count)]


def initial_of_shapes() -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in SHAPES.items()}


def test_both_paths_draw_the_same_bits(kernel_device):
    from tests.optim.rounding_kernel import both

    number = torch.randn(1024, generator=torch.Generator().manual_seed(0)) * torch.logspace(-38, 38, 1024)
    number[:4] = torch.tensor([float("inf"), float("nan"), 0.0, 1 + 2**-8])
    number[4] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    names, first = name_key(3, "p"), 2**33 - 500
    found = [torch.zeros(1024, dtype=torch.int16, device=kernel_device) for _ in range(2)]
    words = torch.tensor([*names, first], device=kernel_device)
    both[(1,)](number.to(kernel_device), *found, words, 9, COUNT=1024)
    wanted = stochastically(number, first, stream_of(names, 9)), number.bfloat16()
    for theirs, ours in zip(wanted, found, strict=True):
        assert torch.equal(theirs.nan_to_num(7.0), ours.cpu().view(torch.bfloat16).nan_to_num(7.0))


def on_meta(views: dict[str, tuple[int, ...]]) -> Flat:
    """A flat of whole parameters that takes no memory."""
    fragments, offset = [], 0
    for name, view in views.items():
        fragments.append(Fragment(name, view, view, 0, torch.Size(view).numel(), offset))
        offset += fragments[-1].numel
    return Flat(torch.zeros(offset, device="meta"), tuple(fragments))


BLOCKS = {
    f"{i}.{name}": view
    for i in range(48)
    for name, view in {
        "qkv": (3, 16, 104, 1664), "proj": (1664, 16, 104), "fc1": (8192, 1664), "fc2": (1664, 8192),
    }.items()
}  # fmt: skip
"""The kernels of G/14's blocks."""
BIASES = {"embed": (1, 256, 1664)} | {
    f"{i}.{name}": (size,) for i in range(48) for name, size in {"fc1": 8192, "fc2": 1664, "norm": 1664}.items()
}


@pytest.mark.parametrize(
    ("name", "hyper", "views", "most"),
    [
        ("HalfPrecisionMomentumAdam", {}, BLOCKS, 1),
        ("HalfPrecisionMomentumSGD", {}, BIASES, 1),
        ("ModifiedAdafactor", {}, BLOCKS, 4),  # sums, gathered, factors, weights
        ("ModifiedAdafactor", {}, BIASES, 5),  # and the unfactored
        ("ModifiedAdafactor", {"clipping_threshold": 1.0}, BIASES, 8),  # and U² of both, added up
    ],
)
def test_a_flat_of_g14_takes_a_few_launches_and_never_waits(monkeypatch, name, hyper, views, most):
    from vitds.optim.kernels import elementwise, factored

    launched: list[int] = []
    for module in (elementwise, factored):
        monkeypatch.setattr(module, "launch", lambda kernel, programs, *_, **__: programs and launched.append(programs))
    monkeypatch.setattr(kernels, "chosen", lambda choice, tensor: True)
    flat = on_meta(views)
    optimizer = OPTIMIZERS[name]([flat.tensor], lr=1e-3, **hyper)
    optimizer.bind([flat])
    flat.tensor.grad = torch.zeros_like(flat.tensor)
    optimizer.step()
    launched.clear()
    monkeypatch.setattr(torch, "tensor", None)  # made from numbers of the host, it would be copied to the device
    with Operations() as seen:
        optimizer.step()  # on the meta device waiting for a value is an error
    assert len(launched) == most
    assert max(launched) > 48
    assert (
        len([n for n in seen.names if not any(word in n for word in ("view", "empty", "detach", "profiler"))]) <= 2
    ), seen.names


class Operations(TorchDispatchMode):
    """Names of torch's own operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_torch_path_makes_nothing_on_the_host_in_a_step(monkeypatch):
    flat = on_meta({"fc1": (64, 48), "norm": (48,)})
    optimizer = OPTIMIZERS["ModifiedAdafactor"]([flat.tensor], lr=1e-3, clipping_threshold=1.0)
    optimizer.bind([flat])
    flat.tensor.grad = torch.zeros_like(flat.tensor)
    optimizer.step()
    monkeypatch.setattr(torch, "tensor", None)
    optimizer.step()
    assert optimizer.updates == 2


def test_where_they_cannot_run_torch_serves_and_asking_for_them_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernels.trouble_with.cache_clear()
    assert not kernels.chosen("auto", torch.zeros(1))
    with pytest.raises(base.UserError, match="cannot step a tensor on cpu: it is not a CUDA device"):
        kernels.chosen("triton", torch.zeros(1))
    kernels.trouble_with.cache_clear()
