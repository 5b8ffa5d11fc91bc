"""Execution choices: they change how numbers are computed, are refused where they cannot, and compile one block once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.test_forward import pictures, scrambled, small
from vitds.config import load_run_file
from vitds.errors import UserError
from vitds.models import execute_as
from vitds.models.execution import KERNELS, choose_attention
from vitds.train_section import TrainSection

CPU = torch.device("cpu")
FLASH = "_scaled_dot_product_flash_attention_for_cpu.default"


class Names(TorchDispatchMode):
    """The operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def torchs_own_order() -> Iterator[None]:
    yield
    choose_attention("default", 8, torch.float32, CPU)
    torch._dynamo.reset()


def switches() -> list[bool]:
    backend = torch.backends.cuda
    ask = (backend.flash_sdp_enabled, backend.cudnn_sdp_enabled, backend.mem_efficient_sdp_enabled)
    return [switch() for switch in (*ask, backend.math_sdp_enabled)]


def test_the_kernel_named_is_the_one_that_runs() -> None:
    model, images, found = scrambled(small("map")), pictures(), {}
    for kernel in ("default", "flash", "math"):
        execute_as(TrainSection(attention=kernel), model, CPU)
        with Names() as names:
            found[kernel] = model(images).logits.detach()
        assert (FLASH in names.calls) == (kernel != "math")
    assert torch.equal(found["default"], found["flash"])
    torch.testing.assert_close(found["math"], found["flash"])


@pytest.mark.parametrize("kernel", ["cudnn", "efficient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_cannot_run_here_is_refused_and_says_which_can(kernel: str, dtype: torch.dtype) -> None:
    with pytest.raises(
        UserError, match=rf"attention: '{kernel}' cannot run here, on cpu in .*these can: default, flash, math"
    ):
        choose_attention(kernel, 104, dtype, CPU)
    assert switches() == [True] * len(KERNELS)


def test_one_compilation_for_all_blocks() -> None:
    """Deeper than dynamo's cache of 8 entries for one piece of code, beyond which it would silently not compile."""
    model, images = scrambled(small("map", depth=12)), pictures()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model.compile_blocks(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        model(images, labels=torch.tensor([1, 4])).loss.backward()
    assert counters["stats"]["unique_graphs"] == 1
    with torch.no_grad():
        model.eval()
        model(images)
    assert counters["stats"]["unique_graphs"] == 2, "the evaluation's is another one"
    assert not counters["graph_break"] and not counters["frames"]["total"] > 2


def test_a_forward_pass_is_one_iteration_of_the_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else torch raises in an evaluation on a GPU, at the second block. Nothing is recorded here: blocks run eagerly."""
    model, images, begun = scrambled(small("map")), pictures(), list[bool]()
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(torch.is_grad_enabled()))
    execute_as(TrainSection(compile=True, compile_mode="reduce-overhead"), model, torch.device("cuda"))
    with torch.compiler.set_stance("force_eager"):
        model(images, labels=torch.tensor([1, 4])).loss.backward()
        with torch.no_grad():
            model.eval()(images)
    assert begun == [True, False]


def test_modes_that_cannot_be(tmp_path: Path) -> None:
    def load(stage: int, **train: object) -> None:
        section = {"zero_optimization": {"stage": stage}, "data_types": {"grad_accum_dtype": "fp32"}}
        path = tmp_path / "run.json"
        path.write_text(json.dumps({"train_batch_size": 8, **section, "vitds": {"train": train}}))
        load_run_file(str(path))

    graphs = {"compile": True, "compile_mode": "reduce-overhead"}
    load(2, **graphs)
    for stage, why in ((3, "weights move under ZeRO-3"), (1, "the graphs' own memory"), (0, "the graphs' own memory")):
        with pytest.raises(UserError, match=rf"compile_mode: 'reduce-overhead'.*found {stage}: .*{why}"):
            load(stage, **graphs)
    load(3, compile=True, compile_mode="max-autotune-no-cudagraphs")
    with pytest.raises(UserError, match=r"compile_mode: 'reduce-overhead' changes nothing without"):
        load(2, compile_mode="reduce-overhead")
    with pytest.raises(UserError, match="compile_mode: 'reduce-overhead' records CUDA graphs; this run is on cpu"):
        execute_as(replace(TrainSection(), **graphs), scrambled(small("map")), CPU)
