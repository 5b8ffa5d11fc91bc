"""The heart: the same recorded gradients through our optimizers under every wrapper of every ZeRO stage, at 1, 2 and 3
ranks, against the float64 reference; and the same without the all-reduce, which must be caught."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import ranks
from tests.optim.reference import Run, errors, full_run
from tests.zero import recorded
from tests.zero.cells import ACCUMULATION, STEPS
from vitds.models import ModelSection, ViTForImageClassification, build_config

WORLDS = (1, 2, 3)


@pytest.fixture(scope="module", params=WORLDS, ids=lambda w: f"{w} ranks")
def launched(request, tmp_path_factory):
    """(world size, {optimizer|cell: {parameter: final masters}}) of one launch that walked all cells."""
    world: int = request.param
    directory = tmp_path_factory.mktemp(f"recorded{world}")
    done = ranks(world, Path(recorded.__file__), directory)
    pieces = [load_file(path) for path in sorted(directory.glob("rank*.safetensors"))]
    assert len(pieces) == world, done.stdout[-3000:]
    assert done.returncode == 0, done.stdout[-3000:]
    return world, *assemble(pieces)


def assemble(pieces: list[dict[str, torch.Tensor]]):
    """({run: {parameter: final masters}}, {run: facts}) from what the ranks wrote."""
    runs: dict[str, dict[str, torch.Tensor]] = {}
    facts: dict[str, dict[str, str | float]] = {}
    for piece in pieces:
        for key, value in piece.items():
            optimizer, cell, name, start = key.split("|")
            run = f"{optimizer}|{cell}"
            if name in ("wrapper", "state"):
                facts.setdefault(run, {})[name] = start
            elif name == "norm":
                facts.setdefault(run, {})[name] = value.item()
            else:
                shape = recorded.SHAPES[name]
                whole = runs.setdefault(run, {}).setdefault(name, torch.full(shape, float("nan")))
                whole.view(-1)[int(start) : int(start) + value.numel()] = value
    return runs, facts


@cache
def reference(optimizer: str, world: int) -> Run:
    settings = {name: {"weight_decay": g.weight_decay} for g in recorded.groups(optimizer) for name in g.names}
    grads = [averaged(step, world) for step in range(STEPS)]
    lr = recorded.OPTIMIZERS[optimizer]["lr"]
    lrs = [lr * recorded.factor(step) for step in range(STEPS)]
    initial = {name: recorded.initial(name) for name in recorded.SHAPES}
    return full_run(optimizer, initial, recorded.VIEWS, grads, settings, clip=0.5, lrs=lrs)


def averaged(step: int, world: int) -> dict[str, torch.Tensor]:
    """The mean gradient of one step over micro batches and ranks, float64."""
    return {
        name: sum(
            recorded.gradient(name, step, micro, rank, world).double() for micro in range(ACCUMULATION) for rank in range(world)
        ) / (ACCUMULATION * world)
        for name in recorded.SHAPES
    }  # fmt: skip


def worst(runs, run: str, world: int) -> tuple[float, float]:
    """(largest error where every bf16 rounding is clear, largest error elsewhere), relative to the parameter's movement."""
    optimizer = run.split("|")[0].replace("broken", "ModifiedAdafactor")
    initial = {name: recorded.initial(name) for name in recorded.SHAPES}
    found = errors(runs[run], initial, reference(optimizer, world))
    return max(e.decided for e in found.values()), max(e.doubtful for e in found.values())


@pytest.mark.launch
def test_every_cell_matches_the_equations(launched, record_property):
    world, runs, facts = launched
    table, bad = [], []
    for optimizer, cell in recorded.tried(world):
        run = f"{optimizer}|{cell}"
        decided, doubtful = worst(runs, run, world)
        table.append(f"{world} ranks  {cell:28} {facts[run]['wrapper']:30} {optimizer:26} {decided:.1e} {doubtful:.1e}")
        if not decided < 3e-6 or not doubtful < 2e-2:
            bad.append(table[-1])
    print("\n".join(table))
    assert not bad, "\n".join(bad)


@pytest.mark.launch
def test_the_gradient_norm_is_the_true_one(launched):
    world, _, facts = launched
    true = torch.cat([g.flatten() for g in averaged(STEPS - 1, world).values()]).norm().item()
    for run, fact in facts.items():
        if not run.startswith("broken"):
            assert fact["norm"] == pytest.approx(true, rel=1e-5), run


@pytest.mark.launch
def test_without_the_all_reduce_it_is_caught(launched):
    world, runs, _ = launched
    if world == 1:
        pytest.skip("one rank sums nothing")
    found = {cell: worst(runs, f"broken|{cell}", world)[0] for cell in ("fp32 z1", "fp32 z2", "fp32 z3")}
    print(world, "ranks, all-reduce removed:", found)
    assert all(error > 1e-2 for error in found.values()), found


@pytest.mark.launch
def test_a_rank_holds_its_share_of_the_state_and_no_more(launched):
    """Adam: 2 + 4 bytes for its share of the parameters; Adafactor: 2, plus row and column factors, which every rank has."""
    world, _, facts = launched
    total = sum(torch.Size(shape).numel() for shape in recorded.SHAPES.values())
    padding = 64 * len(recorded.SHAPES)
    factors = second_moment(recorded.SHAPES, recorded.VIEWS)
    for cell in ("fp32 z1", "bf16 z1 fp32 sums"):
        adafactor, adam = (
            int(facts[f"{name}|{cell}"]["state"]) for name in ("ModifiedAdafactor", "HalfPrecisionMomentumAdam")
        )
        assert adam <= 6 * total / world + padding
        assert adafactor <= 2 * total / world + 4 * sum(factors) + padding


def second_moment(shapes, views) -> tuple[int, int]:
    """(row and column factors, unfactored second moments) of ModifiedAdafactor, in numbers."""
    factored = whole = 0
    for name, shape in shapes.items():
        view = torch.Size(views.get(name, shape))
        small, large = sorted(view)[-2:] if len(view) > 1 else (0, 0)
        if small >= 32:
            factored += view.numel() // large + view.numel() // small
        else:
            whole += view.numel()
    return factored, whole


def test_the_second_moment_of_G_14_is_half_a_percent_of_the_weights():
    """The paper's saving: 33 MiB of second moments beside 7.19 GiB of weights (with the 29,593-class classifier)."""
    with torch.device("meta"):
        model = ViTForImageClassification(build_config(ModelSection(variant="ViT-G/14", num_classes=29593)))
    factored, whole = second_moment(model.shapes, model.factored_views())
    assert factored == 6_543_513
    assert factored + whole == 8_690_098
    weights = sum(torch.Size(shape).numel() for shape in model.shapes.values())
    assert weights == 1_930_404_761
    assert (factored + whole) / weights < 0.01
