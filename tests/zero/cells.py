"""The cells of the ZeRO matrix: one DeepSpeed section each, with its wrapper's name."""

from __future__ import annotations

from typing import Any

from vitds.optim.groups import FLAT_ELEMENTS

FP32: dict[str, Any] = {}
BF16 = {"bf16": {"enabled": True}}
BF16_MASTERS = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
FP16: dict[str, Any] = {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 8}}
GROWING = {"fp16": {**FP16["fp16"], "loss_scale_window": 4}}
"""A loss scale that doubles in every fourth step."""
FP32_SUM = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
BF16_SUM = {"data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "fp32"}
FP16_SUM = {"data_types": {"grad_accum_dtype": "fp16"}, "communication_data_type": "fp32"}

BUCKET = 9000
"""Elements: of the models here one tensor or two are larger, and each of the others shares its bucket with some."""


def _cell(precision: dict[str, Any], sums: dict[str, Any], stage: int, **zero: Any) -> dict[str, Any]:
    return {
        **precision,
        **sums,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET, **zero},
        "gradient_clipping": 0.5,
    }


CELLS: dict[str, dict[str, Any]] = {
    "fp32 z0": _cell(FP32, FP32_SUM, 0),
    "fp32 z1": _cell(FP32, FP32_SUM, 1),
    "fp32 z2": _cell(FP32, FP32_SUM, 2),
    "fp32 z2 round-robin": _cell(FP32, FP32_SUM, 2, round_robin_gradients=True),
    "fp32 z2 aligned": _cell(FP32, FP32_SUM, 2, parameter_alignment=True),
    "fp32 z2 no reduce-scatter": _cell(FP32, FP32_SUM, 2, reduce_scatter=False),
    "fp32 z3": _cell(FP32, FP32_SUM, 3, stage3_param_persistence_threshold=0),
    "fp32 z3 tiny sub-groups": _cell(FP32, FP32_SUM, 3, sub_group_size=500, stage3_param_persistence_threshold=100),
    "bf16 z0": _cell(BF16, BF16_SUM, 0),
    "bf16 z1": _cell(BF16, BF16_SUM, 1),
    "bf16 z1 fp32 sums": _cell(BF16, FP32_SUM, 1),
    "bf16 z2": _cell(BF16, FP32_SUM, 2),
    "bf16 z2 round-robin": _cell(BF16, FP32_SUM, 2, round_robin_gradients=True),
    "bf16 z2 bf16 sums": _cell(BF16, BF16_SUM, 2),
    "bf16 z2 overlapping": _cell(BF16, FP32_SUM, 2, overlap_comm=True),
    "bf16 z3": _cell(BF16, FP32_SUM, 3, stage3_param_persistence_threshold=0),
    "bf16 z3 tiny sub-groups": _cell(BF16, FP32_SUM, 3, sub_group_size=500),
    "masters z1": _cell(BF16_MASTERS, BF16_SUM, 1),
    "masters z2": _cell(BF16_MASTERS, FP32_SUM, 2),
    "masters z3": _cell(BF16_MASTERS, FP32_SUM, 3, stage3_param_persistence_threshold=0),
    "fp16 z0": _cell(FP16, FP16_SUM, 0),
    "fp16 z1": _cell(FP16, FP32_SUM, 1),
    "fp16 z2": _cell(FP16, FP32_SUM, 2),
    "fp16 z2 growing scale": _cell(GROWING, FP32_SUM, 2),
    "fp16 z3": _cell(FP16, FP32_SUM, 3),
}
SMALL_FLATS = {"fp32 z2": 5000, "fp32 z2 round-robin": 5000, "bf16 z1": 3000, "bf16 z1 fp32 sums": 3000, "bf16 z2": 1}
CELLS |= {f"{cell} small flats": CELLS[cell] for cell in SMALL_FLATS}
"""The same with groups cut into several flats, down to one for each parameter."""


def flat_elements(cell: str) -> int:
    """The largest flat of a rank in a cell."""
    return SMALL_FLATS.get(cell.removesuffix(" small flats"), 0) if cell.endswith(" small flats") else FLAT_ELEMENTS


ACCUMULATION = 2
STEPS = 20
