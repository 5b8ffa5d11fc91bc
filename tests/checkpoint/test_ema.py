"""The average of the weights: what it is, and that evaluating it leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launching import ranks
from vitds import dist
from vitds.checkpoint import ema as ema_module
from vitds.checkpoint.ema import Ema, EmaSection
from vitds.data import DataSection, EvalLoader, SourceSection, build_sources
from vitds.errors import Preempted, UserError
from vitds.evaluation import evaluate
from vitds.layout import Shard
from vitds.models import ModelSection, ViTForImageClassification, build_config
from vitds.sections import parse

AWKWARD = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45, -(2.0**-149)])


def masters(*sizes: int, seed: int = 0) -> list[Shard]:
    generator = torch.Generator().manual_seed(seed)
    return [Shard(f"p{i}", (n,), torch.randn(n, generator=generator)) for i, n in enumerate(sizes)]


def bits(shards: list[Shard]) -> list[list[int]]:
    return [shard.data.view(torch.int32).tolist() for shard in shards]


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.9999])
def test_the_average_is_that_of_the_equation(decay: float) -> None:
    held = masters(7, 0, 1000)
    ema = Ema(lambda: held, decay)
    reference = [shard.data.double() for shard in held]
    generator = torch.Generator().manual_seed(1)
    for _ in range(2000):
        for shard, average in zip(held, reference, strict=True):
            shard.data.add_(torch.randn(shard.data.numel(), generator=generator), alpha=0.01)
            average.mul_(decay).add_(shard.data.double(), alpha=1 - decay)
        ema.update()
    for shard, average in zip(ema.shards(), reference, strict=True):
        # At most half an ulp an update is lost, and forgotten as the average itself is.
        torch.testing.assert_close(shard.data.double(), average, rtol=0, atol=4e-7 + 4e-8 * min(1 / (1 - decay), 200))


def test_weights_that_stay_are_their_own_average() -> None:
    held = masters(1000)
    ema = Ema(lambda: held, 0.9999)
    for _ in range(3000):
        ema.update()
    assert bits(ema.shards()) == bits(held)


def test_what_is_frozen_is_its_own_average() -> None:
    held = masters(4, 5)
    ema = Ema(lambda: held, 0.5, frozen=["p1"])
    still, moving = bits(held[1:]), bits(held[:1])
    held[0].data.add_(1)
    ema.update()
    assert ema.shards()[1].data.data_ptr() == held[1].data.data_ptr()
    assert ema.shards()[0].data.data_ptr() != held[0].data.data_ptr()
    with ema.exchanged(lambda: None):
        assert bits(held[1:]) == still
        assert bits(held[:1]) != moving
        assert bits(ema.shards()[1:]) == still
    ema.reset()
    assert bits(held[1:]) == still


def test_shards_are_live_views_named_as_the_parameters() -> None:
    held = masters(3, 4)
    ema = Ema(lambda: held, 0.5)
    for shard, master in zip(ema.shards(), held, strict=True):
        assert (shard.name, shard.shape, shard.start) == (master.name, master.shape, master.start)
        assert shard.data.data_ptr() != master.data.data_ptr()
        shard.data.zero_()
    ema.update()
    assert torch.equal(ema.shards()[0].data, held[0].data / 2)
    held[0].data.fill_(3)
    ema.reset()
    assert bits(ema.shards()) == bits(held)


@pytest.mark.parametrize("error", [None, RuntimeError("x"), Preempted("SIGTERM"), KeyboardInterrupt()])
def test_what_changes_places_comes_back_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, error: BaseException | None
) -> None:
    monkeypatch.setattr(ema_module, "CHUNK_ELEMENTS", 3)
    held = [*masters(7, 0, 3), Shard("awkward", (5,), AWKWARD.clone())]
    ema = Ema(lambda: held, 0.5)
    for shard in ema.shards():
        shard.data.add_(1)
    own, average = bits(held), bits(ema.shards())
    computing: list[Any] = []

    def refresh() -> None:
        computing[:] = bits(held)

    def body() -> None:
        with ema.exchanged(refresh):
            assert (bits(held), bits(ema.shards()), computing) == (average, own, average)
            if error is not None:
                raise error

    if error is None:
        body()
    else:
        with pytest.raises(type(error)):
            body()
    assert (bits(held), bits(ema.shards()), computing) == (own, average, own)


def test_a_rank_that_fails_alone_does_not_wait_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """To make the computing weights follow is collective; a rank with an error of its own must get out and say so."""
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    held, called = masters(5), []
    ema = Ema(lambda: held, 0.5)
    own = bits(held)
    with pytest.raises(OSError, match="disk"), ema.exchanged(lambda: called.append(1)):
        raise OSError("disk")
    assert (bits(held), len(called)) == (own, 1)
    with pytest.raises(Preempted), ema.exchanged(lambda: called.append(1)):
        raise Preempted("SIGTERM")
    assert len(called) == 3


def test_section() -> None:
    assert parse(EmaSection, {}, "vitds.ema") == EmaSection(None, "both")
    assert parse(EmaSection, {"decay": 0.999, "evaluate": "ema"}, "vitds.ema").decay == 0.999
    for wrong in ({"decay": 1}, {"decay": 0.0}, {"decay": -1}, {"evaluate": "none"}, {"decays": 0.9}):
        with pytest.raises(UserError, match=r"vitds\.ema"):
            parse(EmaSection, wrong, "vitds.ema")


class Engine:
    """What `evaluate` needs of one, around an ordinary model."""

    device = torch.device("cpu")

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __call__(self, images: torch.Tensor) -> Any:
        return self.model(images)

    def train(self, mode: bool) -> None:
        self.model.train(mode)


def test_the_average_is_evaluated_under_its_own_names_and_may_be_interrupted() -> None:
    section = ModelSection(width=16, depth=1, mlp_dim=16, num_heads=2, patch_size=4, image_size=8, num_classes=10)
    model = ViTForImageClassification(build_config(section))
    held = [Shard(n, tuple(p.shape), p.detach().view(-1)) for n, p in model.named_parameters()]
    ema = Ema(lambda: held, 0.5)
    for shard in ema.shards():
        shard.data.copy_(torch.randn(shard.data.numel(), generator=torch.Generator().manual_seed(1)) / 4)
    data = DataSection(train=SourceSection("digits"), eval=SourceSection("digits"))
    source = build_sources(data, 10).eval
    assert source is not None
    loader = EvalLoader(source, data, image_size=8, num_classes=10, batch=50, rank=0, world_size=1)
    calls: list[int] = []
    own = evaluate(Engine(model), loader, "sigmoid", lambda: calls.append(1))
    assert len(calls) == len(loader) > 1
    with ema.exchanged(lambda: None):
        average = evaluate(Engine(model), loader, "sigmoid", lambda: None, prefix="eval_ema")
    assert {name.replace("eval/", "eval_ema/") for name in own} == set(average)
    assert own["eval/loss"] != average["eval_ema/loss"]
    assert evaluate(Engine(model), loader, "sigmoid", lambda: None) == own

    def interrupted() -> None:
        calls.append(1)
        if len(calls) == len(loader) + 2:
            raise Preempted("SIGTERM")

    model.train(True)
    with pytest.raises(Preempted):
        evaluate(Engine(model), loader, "sigmoid", interrupted)
    assert len(calls) == len(loader) + 2
    assert model.training


@pytest.mark.launch
def test_under_zero_in_bf16(tmp_path: Path) -> None:
    done = ranks(2, Path(__file__).with_name("averaged.py"), tmp_path, timeout=120)
    assert (tmp_path / "rank1.json").exists(), done.stdout[-4000:]
    assert done.returncode == 0, done.stdout[-3000:]
    for rank in range(2):
        facts = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert list(facts) == ["bf16 z2", "bf16 z3", "bf16 z0"]
        for cell, found in facts.items():
            where = (cell, rank, found)
            assert found.pop("moved") > 1e-3, where
            assert found.pop("apart") < 2e-7, where
            assert found.pop("own apart") > 0.05, where
            assert found.pop("evaluated apart") < 2e-2, where
            assert all(value is True for value in found.values()), where
