"""Buckets fit the model where the run file gives none, and stay where it does."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitds.config import load_run_file
from vitds.zero.buckets import LEAST, MOST, fit_buckets

ROOT = Path(__file__).resolve().parents[2]


def zero(name: str, *overrides: str) -> dict:
    return load_run_file(str(ROOT / "ds_configs" / name), list(overrides), world_size=None).resolved[
        "zero_optimization"
    ]


def test_a_bucket_is_a_thirty_second_of_a_large_model():
    """G/14 has 1,930,404,761 parameters, its largest 49,242,752."""
    assert zero("gigantic_G14_zero2.json")["reduce_bucket_size"] == 1_930_404_761 // 32
    assert zero("gigantic_G14_zero2.json")["allgather_bucket_size"] == 1_930_404_761 // 32
    sharded = zero("gigantic_G14_zero3.json")
    assert sharded["stage3_prefetch_bucket_size"] == sharded["reduce_bucket_size"] == 1_930_404_761 // 32
    assert (sharded["sub_group_size"], sharded["stage3_param_persistence_threshold"]) == (2**26, 0)


@pytest.mark.parametrize(
    ("sizes", "bucket"),
    [([100, 50], 150), ([101, 50], 152), ([10**6] * 20, LEAST), ([3 * 10**7] * 2, 3 * 10**7), ([10**8] * 100, MOST)],
)
def test_it_holds_the_largest_parameter_within_limits(sizes: list[int], bucket: int):
    section = {"stage": 2}
    fit_buckets(section, sizes)
    assert section["reduce_bucket_size"] == bucket


def test_what_the_run_file_says_stays():
    assert zero("gigantic_G14_zero2.json", "zero_optimization.reduce_bucket_size=12345")["reduce_bucket_size"] == 12345
    assert "reduce_bucket_size" not in zero(
        "imagenet_s16.json", 'zero_optimization={"stage": 0}', "data_types.grad_accum_dtype=bf16"
    )
