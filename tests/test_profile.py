"""Where the time of profiled steps went, from made-up events; and a real run, which learns the same with a profile as without."""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import TRAINER, ranks, words
from tests.test_launch import DIGITS, SMALL
from vitds.errors import UserError
from vitds.metrics import StepProfile, Window
from vitds.metrics.attribution import OPTIMIZER, attribute, kind_of


def event(
    category: str, name: str, start: float, length: float, thread: int = 1, correlation: int | None = None
) -> dict:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "pid": 7, "tid": thread, "args": args}


def shares(found) -> dict[str, float]:
    """Of the wall time, those that are not 0."""
    return {kind: pytest.approx(part / found.seconds) for kind, part in found.exclusive.items() if part > 1e-12}


def test_operators_count_without_what_they_call():
    """Two steps of 100 µs, 20 apart: a product that calls a copy, an update, and a collective on a thread of its own."""
    events = [
        event("user_annotation", "vitds.step 5", 0, 100),
        event("cpu_op", "aten::linear", 0, 30),
        event("cpu_op", "aten::addmm", 5, 20),
        event("cpu_op", "aten::copy_", 10, 5),
        event("user_annotation", OPTIMIZER, 60, 30),
        event("cpu_op", "aten::mul", 60, 10),
        event("cpu_op", "aten::copy_", 70, 10),
        event("user_annotation", "gloo:all_reduce", 20, 30, thread=2),
        event("cpu_op", "aten::add", 105, 10),
        event("user_annotation", "vitds.step 6", 120, 100),
        event("cpu_op", "aten::gelu", 120, 40),
        event("cpu_op", "aten::add", 230, 40),  # after the last step
        {"ph": "M", "name": "process_name", "args": {}},
    ]
    found = attribute(events)
    assert (found.steps, found.seconds, found.on_device) == (2, pytest.approx(220e-6), False)
    # linear's own 0-5 and 25-30, addmm's 5-10 and 15-25; of the collective only 30-50 is not hidden
    assert shares(found) == {
        "matmul": 25 / 220, "copies": 5 / 220, "communication": 20 / 220, "optimizer": 20 / 220, "elementwise": 40 / 220,
        "waiting": 90 / 220, "between steps": 20 / 220,
    }  # fmt: skip
    assert sum(found.exclusive.values()) == pytest.approx(found.seconds)
    assert found.communication == pytest.approx(30e-6)
    calls = {(cost.name, cost.kind): (cost.calls, pytest.approx(cost.seconds * 1e6)) for cost in found.costs}
    assert calls["aten::addmm", "matmul"] == (1, 15)
    assert calls["aten::copy_", "copies"] == (1, 5)
    assert calls["aten::copy_", "optimizer"] == (1, 10)
    assert found.costs[0].name == "aten::gelu"


def test_kernels_belong_to_where_they_were_launched():
    """On a GPU only kernels count, also those that run after the host has gone on; what hides behind compute is not waited for."""
    events = [
        event("user_annotation", "vitds.step 1", 0, 100),
        event("cpu_op", "aten::scaled_dot_product_attention", 0, 5),
        event("cuda_runtime", "cudaLaunchKernel", 1, 1, correlation=1),
        event("user_annotation", "Optimizer.step#ModifiedAdafactor.step", 10, 20),
        event("cuda_driver", "cuLaunchKernel", 12, 1, correlation=2),
        event("cuda_runtime", "cudaMemcpyAsync", 14, 1, correlation=3),
        event("cuda_runtime", "cudaLaunchKernel", 16, 1, correlation=4),
        event("cuda_runtime", "cudaLaunchKernel", 110, 1, correlation=5),  # an evaluation, say
        event("user_annotation", "vitds.step 2", 120, 80),
        event("cuda_runtime", "cudaLaunchKernel", 121, 1, correlation=6),
        event("kernel", "sm90_xmma_gemm_bf16", 5, 20, thread=70, correlation=1),
        event("kernel", "triton_poi_fused_mul_3", 40, 20, thread=70, correlation=2),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 60, 10, thread=70, correlation=3),
        event("kernel", "ncclDevKernel_AllGather_RING_LL", 50, 40, thread=71, correlation=4),
        event("kernel", "nvjet_hsh_128x256", 125, 15, thread=70, correlation=5),
        event("kernel", "triton_per_fused_add_native_layer_norm_7", 140, 50, thread=70, correlation=6),
        event("gpu_user_annotation", "vitds.step 1", 5, 90, thread=70),
    ]
    found = attribute(events)
    assert found.on_device
    assert shares(found) == {
        "attention": 20 / 200, "optimizer": 30 / 200, "communication": 20 / 200, "norms": 50 / 200, "waiting": 45 / 200,
        "between steps": 35 / 200,
    }  # fmt: skip
    text = found.table(3)
    assert "2 step(s) of 100 µs each" in text
    assert "25.0%      25 µs      0.5  norms          triton_per_fused_add_native_layer_norm_7" in text
    assert "20 µs a step, 10 µs of it while other work ran" in text


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>", "matmul"),
        ("triton_tem_fused_addmm_gelu_2", "matmul"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<96>>", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64_k128_sm80", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma", "attention"),
        ("void at::native::vectorized_layer_norm_kernel<c10::BFloat16>", "norms"),
        ("void at::native::GammaBetaBackwardCUDAKernelTemplate<c10::BFloat16>", "norms"),
        ("triton_red_fused_native_layer_norm_backward_11", "norms"),
        ("triton_poi_fused_gelu_1", "elementwise"),
        ("void at::native::bfloat16_copy_kernel_cuda", "copies"),
        ("Memset (Device)", "copies"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("c10d::allreduce_", "communication"),
        ("aten::_to_copy", "copies"),
        ("aten::bmm", "matmul"),
    ],
)
def test_kinds_by_name(name, kind):
    assert kind_of(name) == kind


def test_a_trace_without_steps_says_nothing():
    assert attribute([event("cpu_op", "aten::add", 0, 1)]) is None


def test_what_the_option_may_be():
    assert Window.parse("7") == Window(7, 3, (0,))
    assert Window.parse("7:2") == Window(7, 2, (0,))
    assert Window.parse("7:2:8,0") == Window(7, 2, (0, 8))
    assert Window.parse("7:2:all").ranks is None
    for wrong in ("", "0:1", "1:0", "-1", "1:2:3:4", "1:2:", "1:2:x", "1.5", "²"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected FIRST:COUNT"):
            Window.parse(wrong)
    Window.parse("7:2:1").check_ranks(2)
    with pytest.raises(UserError, match="there is no rank 2; allowed: 0 to 1"):
        Window.parse("7:2:0,2").check_ranks(2)


def start(place: Path, text: str, done: int, total: int, broken: int | None = None) -> list[str]:
    """A start of a run of `total` products, after `done` of them; what it said."""
    said: list[str] = []
    profile = StepProfile(Window.parse(text), place, torch.device("cpu"), said.append, done, total)
    for step in range(done, total):
        with profile.step(step):
            torch.ones(8, 8) @ torch.ones(8, 8)
            if step + 1 == broken:
                raise KeyboardInterrupt
            with profile.optimizer():
                torch.ones(8) * 2
    return said


@pytest.mark.parametrize(
    ("asked", "done", "steps"),
    [
        ("3:2", 0, [3, 4]),
        ("1:2", 0, [1, 2]),
        ("3:9", 0, [3, 4, 5, 6]),
        ("3:3", 3, [4, 5]),
        ("1:3", 3, []),
        ("7", 0, []),
    ],
    ids=["in the middle", "from the start", "past the end", "resumed inside", "resumed behind", "beyond the end"],
)
def test_the_steps_that_are_asked_for_and_made(tmp_path, asked, done, steps):
    said = start(tmp_path, asked, done, 6)
    files = sorted(tmp_path.glob("profile/*"))
    if not steps:
        assert not files
        assert len(said) == 1 and "are not in this start of the run" in said[0]
        return
    trace, text = files
    assert trace.name == f"rank0.{steps[0]:09}.pt.trace.json.gz"
    assert said[-1] == text.read_text().rstrip()
    assert ("of steps" in said[0]) == (len(steps) != Window.parse(asked).count)
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert [e["name"] for e in events if e["name"].startswith("vitds.step")] == [f"vitds.step {step}" for step in steps]
    found = attribute(events)
    assert found.exclusive["matmul"] > 0 < found.exclusive["optimizer"]


def test_a_run_that_stops_amid_the_steps_leaves_no_trace(tmp_path):
    for broken in (2, 4):  # in the warm-up, and after
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path, "3:3", 0, 6, broken)
        assert not torch.autograd._profiler_enabled()
        assert not list(tmp_path.glob("profile/*"))
    assert "from step 3 on" in start(tmp_path, "3:3", 0, 6)[-1]


@pytest.mark.launch
def test_a_profiled_run_learns_the_same(tmp_path):
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    ranks(2, TRAINER, *words(DIGITS, plain, SMALL))
    asked = (*words(DIGITS, profiled, SMALL), "--profile", "5:3:all")
    done = ranks(2, TRAINER, *asked)
    assert "profile of rank 0 from step 5 on: 3 step(s)" in done.stdout, done.stdout[-3000:]
    assert "profile of rank 1" not in done.stdout
    for rank in range(2):
        trace = json.loads(gzip.decompress((profiled / f"profile/rank{rank}.000000005.pt.trace.json.gz").read_bytes()))
        found = attribute(trace["traceEvents"])
        assert found.steps == 3
        assert all(found.exclusive[kind] > 0 for kind in ("matmul", "attention", "norms", "optimizer", "communication"))
        assert sum(found.exclusive.values()) == pytest.approx(found.seconds)
        assert (profiled / f"profile/rank{rank}.000000005.txt").read_text().startswith(f"profile of rank {rank} ")
    files = sorted(plain.glob("checkpoints/step-000000012/*.safetensors"))
    assert len(files) >= 2
    for file in files:
        one, other = load_file(file), load_file(profiled / file.relative_to(plain))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), file.name
    again = ranks(2, TRAINER, *asked)
    assert "--profile: steps 5 to 7 are not in this start of the run" in again.stdout, again.stdout[-3000:]
    assert "this run is complete" in again.stdout
