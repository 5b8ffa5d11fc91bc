"""What a step sends: against what was counted under real `deepspeed`, and against the counts of the paper's model."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.launching import ROOT, deepspeed
from tests.planning import counted
from tests.zero import small
from tests.zero.cells import flat_elements
from vitds.config import load_run_file
from vitds.models import ViTForImageClassification, build_config
from vitds.optim.groups import build_groups
from vitds.planning.communication import communication, totals
from vitds.planning.gathers import Settings, gathers
from vitds.planning.job import Job, Traffic
from vitds.planning.verbs import read

TORTURE = bool(os.environ.get("VITDS_TORTURE"))
G14 = 1_930_404_761
"""Parameters of ViT-G/14 with MAP head and 29,593 classes: 1,842,772,352 of the trunk (the paper's 1843 million), 38,360,064
of the MAP head, the rest the classifier's."""


@pytest.fixture(scope="module", params=(2, 3, 4) if TORTURE else (2,), ids=lambda ranks: f"{ranks} ranks")
def launched(request, tmp_path_factory):
    """(ranks, {cell: collectives of one step}) of one launch that walked all cells."""
    directory = tmp_path_factory.mktemp(f"counted{request.param}")
    done = deepspeed(request.param, Path(counted.__file__), directory, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:]
    return request.param, json.loads((directory / "counted.json").read_text())


def job_of(run: counted.Run) -> Job:
    with torch.device("meta"):
        model = ViTForImageClassification(build_config(small.MODEL))
    params = run.optimizer["params"]
    groups = build_groups(
        model.shapes, lr=1, weight_decay=params["weight_decay"], head_weight_decay=params.get("head_weight_decay"),
        decay_patterns=model.decay_patterns(), overrides=run.frozen,
    )  # fmt: skip
    names = tuple(group.names for group in groups if not group.frozen)
    section = counted.SECTIONS[run.section]
    limit = flat_elements(run.section)
    return Job(model.shapes, model.factored_views(), names, section, run.optimizer, run.policy, limit)


@pytest.mark.launch
def test_every_byte_that_was_counted_was_predicted(launched):
    """Exactly, by collective and by the number of ranks that take part."""
    ranks, found = launched
    assert set(found) == set(counted.chosen(ranks))
    table, bad = [], []
    for name, calls in found.items():
        run = counted.RUNS[name]
        predicted = Counter[tuple[str, int]]()
        for part in communication(job_of(run), ranks, run.micro_batches):
            predicted[part.kind, part.ranks] += part.payload
        real = Counter[tuple[str, int]]()
        for kind, size, group in calls:
            real[kind, group] += size
        row = f"{ranks} ranks  {name:45} counted {dict(sorted(real.items()))}"
        table.append(row)
        if real != predicted:
            bad.append(f"{row} predicted {dict(sorted(predicted.items()))}")
    print("\n".join(table))
    assert not bad, "\n".join(bad)


@pytest.mark.launch
def test_the_number_of_collectives_is_predicted(launched):
    """Exactly, but where every owner has its own bucket: a bucket's parameters may then have several."""
    ranks, found = launched
    for name, calls in found.items():
        run = counted.RUNS[name]
        if "one owner" in name:
            continue
        predicted = Counter[str]()
        for part in communication(job_of(run), ranks, run.micro_batches):
            predicted[part.kind] += part.calls
        assert Counter(kind for kind, _, _ in calls) == predicted, name


def job(stage: int, *overrides: str) -> Job:
    return read(str(ROOT / "ds_configs" / f"gigantic_G14_zero{stage}.json"), overrides, load_run_file)[0]


def of(parts: list[Traffic], what: str, kind: str) -> int:
    return sum(part.payload for part in parts if (part.what, part.kind) == (what, kind))


def test_gradients_and_weights_of_the_paper_s_model():
    """bf16 on the way: 2 bytes each, padding of less than 2·n elements a group."""
    groups, ranks = 3, 64
    for stage, times in ((1, 1), (2, 8)):
        parts = communication(job(stage), ranks, 8)
        gradients = of(parts, "gradients", "all_reduce")
        assert 0 <= gradients - times * 2 * G14 < 2 * 2 * ranks * groups
        assert 0 <= of(parts, "weights", "all_gather") - 2 * G14 < 2 * 2 * ranks * groups
        assert set(totals(parts)) == {"all_gather", "all_reduce"}
    assert of(communication(job(2), ranks, 8), "gradients", "all_reduce") == 8 * 2 * G14
    sharded = communication(job(3), ranks, 8)
    tensors = len(job(3).shapes)
    assert 0 <= of(sharded, "gradients", "reduce_scatter") - 8 * 2 * G14 < 8 * 2 * ranks * tensors
    assert of(sharded, "gradients", "all_reduce") == 0


def test_the_factored_sums_are_a_hundredth_of_a_gradient():
    """The paper's optimizer keeps 6,543,513 row and column sums of G/14, fp32 on their way, whatever the stage."""
    for stage in (1, 2, 3):
        parts = communication(job(1).at_stage(stage), 64, 2)  # this run file's optimizer is ModifiedAdafactor
        assert of(parts, "second moments", "all_reduce") == 4 * 6_543_513
    adam = replace(job(1), optimizer={"type": "HalfPrecisionMomentumAdam", "params": {}})
    assert of(communication(adam, 64, 2), "second moments", "all_reduce") == 0


def test_stage_0_keeps_whole_gradients_and_sums():
    parts = communication(job(1).at_stage(0), 8, 4)
    assert totals(parts) == {"all_reduce": 2 * G14 + 8}


def test_one_rank_sends_nothing():
    assert all(communication(job(stage), 1, 4) == [] for stage in (1, 2, 3))


def test_a_large_model_s_weights_are_gathered_almost_twice_only_where_little_is_kept():
    """With DeepSpeed's defaults half of G/14 is still there when backward comes to it; with tight limits nothing is."""
    sizes, every = job(3).sizes, 2 * G14

    def gathered(settings: Settings, policy: str = "none") -> int:
        (batch,) = gathers(sizes, frozenset(), settings, policy, 1)
        return sum(sizes[name] for gather in batch for name in gather.names)

    assert 1.4 * G14 < gathered(Settings()) < 1.55 * G14
    assert 0.95 * every < gathered(Settings(prefetch=50_000_000, max_live=10**8, reuse_distance=10**8)) < every
    assert gathered(Settings(prefetch=0, reuse_distance=0)) == every
    assert gathered(Settings(max_live=10**10, reuse_distance=10**10)) == G14
    assert gathered(Settings(prefetch=0, reuse_distance=10**10)) == G14
    blocks = sum(size for name, size in sizes.items() if name.startswith("blocks."))
    again = gathered(Settings(prefetch=0, reuse_distance=0), "full") - every
    assert 0.6 * blocks < again < blocks  # a block's last module is still there when the block is computed again


def test_hpz_gathers_over_all_ranks_once_a_step():
    """After that each host has a copy, until the update."""
    parts = communication(job(3).at_stage(3, zero_hpz_partition_size=8), 64, 8)
    wide = sum(p.payload for p in parts if p.kind == "all_gather" and p.ranks == 64 and p.when != "step")
    near = sum(p.payload for p in parts if p.kind == "all_gather" and p.ranks == 8)
    alone = sum(p.payload for p in communication(job(3), 64, 8) if p.kind == "all_gather" and p.when != "step")
    assert wide == pytest.approx(2 * G14, rel=2e-3)
    assert wide + near == alone


@pytest.mark.parametrize(
    ("kind", "factor"), [("all_reduce", 2), ("all_gather", 1), ("reduce_scatter", 1), ("reduce", 1)]
)
@pytest.mark.parametrize("ranks", [2, 8, 4096])
def test_a_ring_sends_all_but_its_own_part(kind: str, factor: int, ranks: int):
    wire = Traffic("gradients", kind, 10**9, 1, ranks).wire
    assert math.isclose(wire, factor * 10**9 * (ranks - 1) / ranks)
