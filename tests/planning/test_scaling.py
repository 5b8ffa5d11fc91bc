"""The forecast's closed forms and limits, its table, and what it says about bad input."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.launching import ROOT
from vitds.config import load_run_file
from vitds.errors import UserError
from vitds.planning import verbs
from vitds.planning.job import Traffic
from vitds.planning.scaling import Batches, Forecast, Machine, forecast, seconds
from vitds.planning.verbs import read

RUN_FILE = str(ROOT / "ds_configs" / "gigantic_G14_zero3.json")
GB = 10**9
PERFECT = Machine(mfu=1.0, intra=math.inf, inter=math.inf, latency=0, intra_latency=0)


@pytest.fixture(scope="module")
def g14():
    return read(RUN_FILE, [], load_run_file)


def rows(
    g14, machine: Machine, *gpus: int, stages: tuple[int, ...] = (1, 2, 3), **batches: int
) -> dict[tuple[int, str], Forecast]:
    job, own, flops = g14
    found = forecast(job, replace(own, **batches), flops, machine, gpus, stages)
    return {(row.gpus, row.stage): row for row in found}


def test_bytes_over_bandwidth():
    """Inside a host at its own speed; past it through all of a host's network cards at once."""
    machine = Machine(intra=100 * GB, inter=5 * GB, latency=0, intra_latency=0)
    assert seconds(Traffic("", "all_reduce", GB, 1, 8), machine) == pytest.approx(2 * 7 / 8 / 100)
    assert seconds(Traffic("", "all_gather", GB, 1, 8), machine) == pytest.approx(7 / 8 / 100)
    assert seconds(Traffic("", "all_reduce", GB, 1, 64), machine) == pytest.approx(2 * 63 / 64 / 40)
    fast = replace(machine, inter=50 * GB)  # 8 × 50 GB/s are more than the 100 inside: these rule
    assert seconds(Traffic("", "all_reduce", GB, 1, 64), fast) == pytest.approx(2 * 63 / 64 / 100)
    assert seconds(Traffic("", "all_reduce", GB, 1, 8), machine, across=True) == pytest.approx(2 * 7 / 8 / 5)


def test_hops():
    machine = Machine(intra=math.inf, inter=math.inf, latency=1.0, intra_latency=0.001)
    assert seconds(Traffic("", "all_gather", 8, 3, 64), machine) == pytest.approx(3 * (7 + 0.007))
    assert seconds(Traffic("", "all_reduce", 8, 1, 64), machine) == pytest.approx(2 * (3 + 0.003))
    assert seconds(Traffic("", "reduce", 8, 1, 64), machine) == pytest.approx(3 + 0.003)
    assert seconds(Traffic("", "all_reduce", 8, 1, 8), machine) == pytest.approx(2 * 0.003)


def test_without_latency_and_with_endless_bandwidth_only_compute_is_left(g14):
    """3 × 968 GFLOP an image (recipe: 963.6 of the trunk, the rest the MAP head's and the classifier's)."""
    _, batches, flops = g14
    assert flops == pytest.approx(966e9, rel=5e-3)
    for (gpus, _), row in rows(g14, PERFECT, 8, 64, 4096).items():
        assert row.waited == 0
        assert row.step == pytest.approx(3 * flops * batches.total / gpus / 989e12)
        assert row.efficiency == pytest.approx(1)


def test_one_gpu_and_one_host_know_no_network(g14):
    slow = rows(g14, Machine(inter=1.0), 1, 8)
    fast = rows(g14, Machine(inter=1e15), 1, 8)
    assert {key: row.step for key, row in slow.items()} == {key: row.step for key, row in fast.items()}
    assert all(row.communication == 0 == row.sent for (gpus, _), row in slow.items() if gpus == 1)
    assert all(row.efficiency == 1 for (gpus, _), row in slow.items() if gpus == 8)
    assert {stage for _, stage in slow} == {"1", "2", "3"}


def test_more_latency_or_less_bandwidth_never_helps(g14):
    base = rows(g14, Machine(), 8, 256)
    for worse in (Machine(latency=1e-4), Machine(inter=GB), Machine(intra=10 * GB), Machine(overlap=0.0)):
        found = rows(g14, worse, 8, 256)
        assert all(found[key].step >= base[key].step for key in base)
        assert any(found[key].step > base[key].step for key in base)


def test_what_is_waited_for_is_between_nothing_and_everything(g14):
    for row in rows(g14, Machine(inter=2 * GB), 8, 64, 512).values():
        assert 0 < row.waited <= row.communication * (1 + 1e-12)
    job, batches, flops = g14
    serial = replace(job, section={**job.section, "zero_optimization": {**job.zero, "overlap_comm": False}})
    for row in rows((serial, batches, flops), Machine(), 8, 64).values():
        assert row.waited == pytest.approx(row.communication)


def test_accumulation_costs_stage_2_and_3_their_reduction_again(g14):
    """Stage 1 sends the same whatever the accumulation; at stage 2 gradients go in every micro batch."""
    many, few = rows(g14, Machine(), 64, micro=4), rows(g14, Machine(), 64, micro=64)
    assert (many[64, "2"].accumulation, few[64, "2"].accumulation) == (64, 4)
    assert many[64, "1"].sent == few[64, "1"].sent
    assert many[64, "2"].sent > 12 * few[64, "2"].sent
    assert many[64, "3"].sent > 12 * few[64, "3"].sent


def test_hpz_and_hybrid_sharding_pay_on_slow_networks(g14):
    """On 25 Gbit/s a GPU the weights' way is what counts: hpZ takes it once a step, hybrid sharding never."""
    slow = rows(g14, Machine(inter=3 * GB), 64)
    assert slow[64, "hybrid"].step < slow[64, "3 hpZ"].step < 0.9 * slow[64, "3"].step


def test_the_copies_of_hybrid_sharding_are_added_up_over_the_network_cards(g14):
    """Of 64 GPUs in 8 hosts each sends its eighth of the gradient to 7 others, over its own card."""
    job, _, _ = g14
    near, far = (rows(g14, Machine(inter=speed), 64)[64, "hybrid"].communication for speed in (math.inf, 3 * GB))
    assert far - near == pytest.approx(2 * 7 / 8 * 2 * job.trained / 8 / (3 * GB), rel=1e-6)


def test_the_micro_batch_follows_where_the_run_file_s_does_not_divide(g14):
    row = rows(g14, Machine(), 4096)[4096, "3"]
    assert (row.micro_batch, row.accumulation) == (4, 1)
    assert "32 does not divide" in row.note
    assert Batches(96, 32).on(3) == (32, 1)
    assert Batches(84, 32).on(2) == (21, 2)


@pytest.mark.parametrize(
    ("gpus", "batches", "says"),
    [
        (24, {}, "train_batch_size 16384 does not divide over 24 GPUs; 16368 or 16392 would"),
        (12, {"total": 12 * 32}, "12 GPUs are not whole hosts of 8"),
        (16, {"least_gpus": 32}, "vitds.cluster.min_gpus is 32"),
        (64, {"most_gpus": 32}, "vitds.cluster.max_gpus is 32"),
        (32768, {}, "train_batch_size 16384 does not divide over 32768 GPUs; 32768 would"),
    ],
)
def test_cells_that_cannot_be_say_why(g14, gpus: int, batches: dict[str, int], says: str):
    for row in rows(g14, Machine(), gpus, **batches).values():
        assert row.impossible == says
        assert math.isnan(row.step)


def test_hpz_must_divide_the_ranks(g14):
    job, batches, flops = g14
    odd = job.at_stage(3, zero_hpz_partition_size=3)
    found = {row.stage: row for row in forecast(odd, batches, flops, Machine(), [64], [3])}
    assert found["3 hpZ"].impossible == "zero_hpz_partition_size 3 does not divide 64 GPUs"
    assert found["3 hpZ"].own
    assert not found["3"].impossible


def plan(*words: str) -> int:
    parser = argparse.ArgumentParser(prog="vitds")
    verbs.add_verb(parser.add_subparsers(dest="verb"))
    return verbs.run(parser.parse_args(["plan", "scale", *words]), load_run_file)


def test_the_table(capsys):
    assert plan("--config", RUN_FILE, "--gpus", "64,8,8,12") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "1,930.4 million trained parameters" in lines[0]
    table = lines[lines.index("") + 1 :]
    table = table[: table.index("")]
    assert [tuple(line.split()[:2]) for line in table[1:] if "does not divide" not in line] == [
        *(("8", stage) for stage in "123"), *(("64", stage) for stage in ("1", "2", "3", "3", "hybrid"))
    ]  # fmt: skip
    assert sum("16384 does not divide over 12 GPUs" in line for line in table) == 5
    assert all("←" in line for line in table if line.split()[1:3] == ["3", "←"])
    assert sum("←" in line for line in table) == 3
    assert any("does not have it" in line for line in lines)


def test_for_programs(capsys):
    assert plan("--config", RUN_FILE, "--gpus", "8,12", "--inter-gb-per-s", "12.5", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["parameters"] == 1_930_404_761
    assert said["machine"]["inter"] == 12.5e9
    first, last = said["rows"][0], said["rows"][-1]
    assert first["images_per_second"] == pytest.approx(16384 / first["step"])
    assert last["step"] is None
    assert last["impossible"]


def test_bytes_by_collective(capsys):
    assert plan("--config", RUN_FILE, "--gpus", "64", "--bytes", "--json") == 0
    found = {row["stage"]: row["parts"] for row in json.loads(capsys.readouterr().out)["rows"]}
    (gradients,) = (part for part in found["2"] if part["what"] == "gradients")
    assert gradients["payload"] == 8 * 2 * 1_930_404_761
    assert gradients["wire"] == pytest.approx(2 * 63 / 64 * gradients["payload"])
    assert plan("--config", RUN_FILE, "--gpus", "64,12", "--bytes") == 0
    assert "reduce_scatter" in capsys.readouterr().out


def test_a_run_file_that_only_many_gpus_may_start(capsys):
    """Its bounds are the table's business: it is not started here."""
    bounds = ("--set", "vitds.cluster.min_gpus=16", "--set", "vitds.cluster.max_gpus=32")
    assert plan("--config", RUN_FILE, "--gpus", "8,16,64", "--json", *bounds) == 0
    reasons = {row["gpus"]: row["impossible"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert reasons == {8: "vitds.cluster.min_gpus is 16", 16: "", 64: "vitds.cluster.max_gpus is 32"}


def test_a_run_file_that_fixes_its_accumulation(capsys):
    assert plan("--config", RUN_FILE, "--gpus", "8", "--set", "gradient_accumulation_steps=8") == 0
    assert "32 × 64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--gpus", "8,x"), "--gpus: expected a whole number from 1 to 1000000, found 'x'"),
        (("--gpus", "0"), "--gpus: expected a whole number from 1 to 1000000, found '0'"),
        (("--gpus", ""), "--gpus: expected a whole number"),
        (("--gpus-per-host", "-8"), "--gpus-per-host"),
        (("--mfu", "1.5"), "--mfu: expected a number in (0, 1], found '1.5'"),
        (("--mfu", "0"), "--mfu: expected a number in (0, 1], found '0'"),
        (("--overlap", "2"), "--overlap: expected a number in [0, 1], found '2'"),
        (("--peak-tflops", "0"), "--peak-tflops: expected a number > 0, found '0'"),
        (("--inter-gb-per-s", "nan"), "--inter-gb-per-s: expected a finite number, found 'nan'"),
        (("--intra-gb-per-s", "fast"), "--intra-gb-per-s: expected a number, found 'fast'"),
        (("--latency-us", "-1"), "--latency-us: expected a number ≥ 0, found '-1'"),
    ],
)
def test_hardware_that_cannot_be(words: tuple[str, ...], says: str, capsys):
    with pytest.raises(SystemExit) as ended:
        plan("--config", RUN_FILE, *words)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--config", "ds_configs/gigantic_G14_zero4.json"), "no such file.*did you mean 'gigantic_G14_zero"),
        (("--config", RUN_FILE, "--set", "vitds.cluster.min_gpu=8"), "min_gpu.*did you mean 'min_gpus'"),
        (("--config", RUN_FILE, "--set", "vitds.cluster=8"), "vitds.cluster"),
        (("--config", RUN_FILE, "--set", "zero_optimization.stages=2"), "did you mean 'stage'"),
        (("--config", RUN_FILE, "--set", "train_batch_size=many"), "train_batch_size"),
    ],
)
def test_run_files_that_cannot_be(words: tuple[str, ...], says: str, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=says):
        plan(*words)


def test_the_page_shows_what_the_code_prints(capsys):
    """docs/scaling.md has the verb's own output, between the lines that mark it."""
    page = (Path(ROOT) / "docs" / "scaling.md").read_text()
    blocks = page.split("\n```\n$ vitds plan scale ")[1:]
    assert len(blocks) >= 2
    for block in blocks:
        command, _, printed = block.partition("\n")
        plan(*(str(ROOT / word) if word.startswith("ds_configs/") else word for word in command.split()))
        assert capsys.readouterr().out.strip() == printed.partition("\n```")[0].strip(), command
