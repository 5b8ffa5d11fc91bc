"""bf16 masters: where they are refused, and what the run file must say."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitds.config import load_run_file
from vitds.errors import UserError
from vitds.zero.section import bf16_masters

DIGITS = str(Path(__file__).resolve().parents[2] / "ds_configs" / "digits.json")
BOTH = ["bf16.bf16_master_weights_and_grads=true", "bf16.bf16_optimizer_states=true"]


def test_both_words_together_are_taken():
    assert bf16_masters(load_run_file(DIGITS, BOTH).deepspeed)
    assert not bf16_masters(load_run_file(DIGITS, []).deepspeed)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (BOTH[:1], "bf16_optimizer_states: must be true"),
        (BOTH[1:], "bf16_master_weights_and_grads: must be true"),
        ([*BOTH, "bf16.enabled=false"], "bf16.enabled is not true"),
        ([*BOTH, "zero_optimization.stage=0", "data_types.grad_accum_dtype=bf16"], "not at ZeRO-0"),
        ([*BOTH, "zero_optimization.stage=1"], "fp32 masters; set zero_optimization.stage to 2"),
        ([*BOTH, 'optimizer={"type": "AdamW", "params": {"lr": 0.001}}'], "AdamW rounds to nearest.*ModifiedAdafactor"),
        ([*BOTH, "vitds.ema.decay=0.999"], "vitds.ema.decay: not with"),
        (["fp16.fp16_master_weights_and_grads=true", "bf16.enabled=false"], "fp16_master_weights_and_grads: not supported"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(overrides: list[str], says: str):
    with pytest.raises(UserError, match=says):
        load_run_file(DIGITS, overrides)
