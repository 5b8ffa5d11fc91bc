"""Memory and waiting that DeepSpeed 0.19.8 spends without need, taken from a built engine; no number changes.

Measured by tests/zero/test_spent.py. What is done, and what it saves, in bytes for each parameter that a rank steps:

    stages 1, 2    the averaged gradient is added into one buffer for each flat, as DeepSpeed itself does where it sums
                   16-bit gradients in fp32: no second gradient beside the first (2), no copy when the flat is stepped,
                   none in fp32 of a gradient that is added (4 bytes an element of the largest)
    stage 1 with   what is left of a whole fp32 gradient: it is sent in pieces of `reduce_bucket_size`, not of 500 million
    fp32 sums      elements (6 each), and a 16-bit gradient goes as soon as it was added (2)
    stages 1, 2    with overlap_comm the device's streams wait for each other, not the host for the device
    all            the throughput timer, which nothing reads, makes the host wait twice a micro batch
"""

from __future__ import annotations

from functools import partial
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer


def lean_section(section: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's half of the run file with what it says only there."""
    section = {"timers": {"throughput": {"enabled": False}}, **section}
    if section.get("bf16", {}).get("enabled"):
        section["bf16"] = {"immediate_grad_update": True, **section["bf16"]}
    return section


def make_lean(engine: Any) -> None:
    """Bind what is said above to a built engine and its wrapper."""
    wrapper = engine.optimizer
    if isinstance(wrapper, DeepSpeedZeroOptimizer):
        wrapper._use_compact_grad_partition_buffer = lambda group: True
        wrapper._add_to_grad_partition_buffer = _add
        if wrapper.overlap_comm:
            wrapper.independent_gradient_partition_epilogue = partial(
                _streams_wait, wrapper, wrapper.independent_gradient_partition_epilogue
            )
    elif isinstance(wrapper, BF16_Optimizer):
        bucket = int(engine.zero_reduce_bucket_size())
        wrapper.get_grads_for_reduction = lambda: (
            [piece for flat in wrapper.non_expert_gradients for piece in flat.split(bucket)],
            {},
        )
        # A bucket goes off once it is passed.
        engine.allreduce_gradients = partial(engine.allreduce_gradients, bucket_size=bucket - 1)


def _add(total: Any, gradient: Any) -> None:
    """A 16-bit gradient is widened as it is added, not in a copy of its own."""
    if total is not None:
        total.add_(gradient)


def _streams_wait(wrapper: Any, epilogue: Any) -> None:
    """The end of a backward pass under overlap_comm, for which DeepSpeed makes the host wait for the whole device."""
    wrapper.reduce_ipg_grads()  # what is left, still on the stream of reductions
    if not get_accelerator().resolves_data_dependency():
        get_accelerator().current_stream().wait_stream(wrapper.reduction_stream)
    wrapper.overlap_comm = False
    try:
        epilogue()
    finally:
        wrapper.overlap_comm = True
