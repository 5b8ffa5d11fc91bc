"""The run file: what is accepted, and the one message for everything that is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vitds.config import batches, load_run_file, prepare
from vitds.errors import UserError

DIGITS = Path(__file__).resolve().parent.parent / "ds_configs" / "digits.json"


def load(tmp_path: Path, change=None, sets=(), world: int = 2, text: str | None = None):
    given = json.loads(DIGITS.read_text())
    if change:
        change(given)
    path = tmp_path / "run.json"
    path.write_text(text if text is not None else json.dumps(given))
    return load_run_file(str(path), list(sets), world_size=world)


def put(place: str, value):
    def change(given):
        *parents, last = place.split(".")
        for word in parents:
            given = given.setdefault(word, {})
        given[last] = value

    return change


BAD = [
    ("zero_optimization.allgather_bucket_size", 1001, "not even"),
    ("gradient_cliping", 1.0, "gradient_clipping"),
    ("zero_optimization.stag", 2, "stage"),
    ("zero_optimization.stage", 4, "stage"),
    ("bf16.enable", True, "enabled"),
    ("data_types.grad_acum_dtype", "fp32", "grad_accum_dtype"),
    ("flops_profiler", {"enabled": False, "outptu_file": "x"}, "output_file"),
    ("vitds.trian", {}, "train"),
    ("vitds.model.varaint", "ViT-G/14", "variant"),
    ("vitds.model.variant", "ViT-H/15x", "ViT-H/15x"),
    ("vitds.model.pool", "mapp", "map"),
    ("vitds.train.seed", "0", "whole number"),
    ("vitds.train.total_epochs", 3, "exactly one"),
    ("vitds.data.train.source", "digit", "digits"),
    ("vitds.data.train.transforms", ["flip_rl"], "flip_lr"),
    ("vitds.guard", {"nonfinite": "ignore"}, "stop, skip"),
    ("vitds.init_from", "runs/digits", "expected an object, found 'runs/digits'"),
    ("vitds.cluster", {"min_gpus": 4}, "min_gpus is 4, and this start has 2 rank"),
    ("vitds.cluster", {"max_gpus": 1}, "max_gpus is 1, and this start has 2 ranks"),
    ("vitds.plugins", ["no_such_module_here"], "no_such_module_here"),
    ("optimizer.type", "ModifiedAdafacto", "ModifiedAdafactor"),
    ("optimizer.type", "Adafactor", "ModifiedAdafactor"),
    ("optimizer.params.learning_rate", 1, "lr"),
    ("optimizer.params.lr", -1, "lr"),
    ("scheduler.type", "rsqr", "rsqrt"),
    ("scheduler.type", "WarmupLR", "constant"),
    ("scheduler.params.warm_up_steps", 3, "warmup_steps"),
    ("tensorboard.enable", True, "enabled"),
    ("train_batch_size", "auto", "auto"),
    ("train_batch_size", 95, "94 or 96"),
    ("train_batch_size", 0, "train_batch_size"),
    ("train_micro_batch_size_per_gpu", 36, "these would: 1, 2, 3, 4, 6, 8, 12, 16, 24, 48"),
    ("gradient_accumulation_steps", 7, "leave it out"),
    ("activation_checkpointing", {"partition_activations": True}, "vitds.train.activation_checkpointing"),
    ("zero_optimization.offload_optimizer", {"device": "cpu"}, "offload_optimizer"),
    ("elasticity", {"enabled": True}, "lastic"),
    ("fp16", {"enabled": True}, "fp16"),
    ("gradient_clipping", "big", "number"),
    ("bf16.enabled", "False", "true or false"),
    ("bf16.check_grad_overflow", False, "cannot be switched off"),
    ("zero_optimization.cpu_offload", True, "cpu_offload"),
    ("compile", {"deepcompile": True}, "vitds.train.compile"),
    ("vitds.train.seed", -1, "at least 0"),
    ("vitds.guard", {"max_skips": -4}, "at least 0"),
]


@pytest.mark.parametrize(("place", "value", "hint"), BAD, ids=lambda v: str(v)[:40])
def test_bad_input_is_one_clear_line(tmp_path, place, value, hint):
    with pytest.raises(UserError) as caught:
        load(tmp_path, put(place, value))
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "run.json")), message
    assert hint in message, message
    assert message.count("\n") == 0, message


def test_syntax_errors_name_line_and_column(tmp_path):
    with pytest.raises(UserError, match="line 2, column 3"):
        load(tmp_path, text="{\n  oops: 1}")


def test_a_key_given_twice_is_named_with_its_path(tmp_path):
    with pytest.raises(UserError, match="bf16.enabled: the key is given twice"):
        load(tmp_path, text='{"bf16": {"enabled": true, "enabled": false}}')


def test_missing_files_name_the_nearest(tmp_path):
    (tmp_path / "digits.json").write_text("{}")
    with pytest.raises(UserError, match="no such file.*did you mean 'digits.json'"):
        load_run_file(str(tmp_path / "digit.json"))
    with pytest.raises(UserError, match="is a directory"):
        load_run_file(str(tmp_path))


def test_overrides_reach_both_halves(tmp_path):
    run = load(
        tmp_path,
        sets=[
            "zero_optimization.stage=3",
            "vitds.train.total_epochs=2",
            "vitds.model.pool=gap",
            "vitds.data.eval=null",
        ],
    )
    assert run.deepspeed["zero_optimization"]["stage"] == 3
    assert (run.vitds.train.total.value, run.vitds.train.total.unit) == (2, "epochs")
    assert run.vitds.model.pool == "gap"
    assert run.vitds.data.eval is None
    with pytest.raises(UserError, match="KEY=VALUE"):
        load(tmp_path, sets=["vitds.train.seed"])
    with pytest.raises(UserError, match="train_batch_size"):
        load(tmp_path, sets=["train_batch_size.a=1"])
    with pytest.raises(UserError, match="not JSON.*put such a value into the run file"):
        load(tmp_path, sets=["vitds.plugins=[tests.wrong_labels]"])  # what a remote shell leaves of ["…"]


def test_the_resolved_file_is_a_run_file_with_the_same_meaning(tmp_path):
    run = load(tmp_path)
    again = load(tmp_path, text=json.dumps(run.resolved))
    assert again == run


def test_a_bare_deepspeed_file_trains_the_paper_s_model(tmp_path):
    bare = {
        "train_batch_size": 32,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "bf16": {"enabled": True},
    }
    run = load(tmp_path, text=json.dumps(bare))
    assert run.vitds.model.variant == "ViT-G/14"
    assert run.deepspeed["zero_optimization"]["stage"] == 2
    assert run.deepspeed["gradient_clipping"] == 1.0
    assert run.deepspeed["data_types"]["grad_accum_dtype"] == "fp32"


BAD_PLANS = [
    ("vitds.train.activation_checkpointing", "fulll", "full"),
    ("vitds.groups", [["no_such.*", {"frozen": True}]], "matches no parameter"),
    ("vitds.train.total_steps", 0, "at least 1"),
    ("vitds.init_from", {"path": "/no/such/place"}, "/no/such/place"),
    ("scheduler.params.warmup_steps", 5000, "do not fit"),
    ("optimizer", {"type": "Rprop", "params": {"lr": 0.1, "etas": [0.5, 0.2]}}, "Rprop"),
]


@pytest.mark.parametrize(("place", "value", "hint"), BAD_PLANS, ids=lambda v: str(v)[:40])
def test_what_only_the_plan_can_tell_is_refused_before_a_process_group(tmp_path, place, value, hint):
    with pytest.raises(UserError) as caught:
        prepare(load(tmp_path, put(place, value)))
    assert hint in str(caught.value)


def test_a_missing_stage_is_stage_2(tmp_path):
    run = load(tmp_path, put("zero_optimization", {"overlap_comm": False}))
    assert run.resolved["zero_optimization"]["stage"] == 2


def test_deepspeed_s_names_in_any_case(tmp_path):
    run = load(tmp_path, put("optimizer", {"type": "adamw", "params": {"lr": 1e-3, "torch_adam": True}}))
    assert run.optimizer["type"] == "AdamW"


def test_stage_0_in_16_bits_proposes_stage_2(tmp_path):
    with pytest.raises(UserError, match="stage to 2"):
        load(tmp_path, put("zero_optimization", {"stage": 0}))


def test_accumulation_follows_from_the_world_size():
    assert batches(4096, 64, 8) == (64, 8)
    assert batches(4096, None, 8) == (512, 1)
    with pytest.raises(UserError, match="4095 or 4098"):
        batches(4096, 64, 3)


def test_a_plugin_s_optimizer_is_chosen_by_name(tmp_path, monkeypatch):
    from vitds.optim import OPTIMIZERS

    (tmp_path / "my_plugin.py").write_text(
        "from vitds.optim import OPTIMIZERS, HalfPrecisionMomentumSGD\n"
        "class Mine(HalfPrecisionMomentumSGD): pass\n"
        "OPTIMIZERS['Mine'] = Mine\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    sets = ['vitds.plugins=["my_plugin"]', "optimizer.type=Mine", 'optimizer.params={"lr":0.1}']
    try:
        assert load(tmp_path, sets=sets).optimizer["type"] == "Mine"
        with pytest.raises(UserError, match="did you mean 'Mine'"):
            load(tmp_path, sets=[*sets, "optimizer.type=Mina"])
    finally:
        OPTIMIZERS.pop("Mine", None)


@pytest.mark.parametrize(
    ("name", "variant", "schedule", "average"),
    [("giant_g14", "ViT-g/14", "cosine", None), ("gigantic_G14", "ViT-G/14", "constant", 0.9999)],
)
def test_the_shipped_fine_tunes_are_the_papers(name, variant, schedule, average):
    """Appendix D: 518 px, SGD with momentum, batch 512, clipping at 1, no decay, softmax, a new classifier, 2 % held out; for G a flat
    rate and an average."""
    run = load_run_file(str(DIGITS.parent / f"finetune_{name}_518.json"), world_size=32)
    assert run.optimizer["type"] == "HalfPrecisionMomentumSGD"
    assert run.optimizer["params"] == {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.0}
    assert (run.resolved["train_batch_size"], run.resolved["gradient_clipping"]) == (512, 1.0)
    assert run.resolved["scheduler"] == {"type": schedule, "params": {"warmup_steps": 500}}
    model, data = run.vitds.model, run.vitds.data
    assert (model.variant, model.image_size, model.loss, model.init_head_bias) == (variant, 518, "softmax", 0.0)
    assert (data.train.transforms, data.minival, data.mixup) == (["inception_crop", "flip_lr"], 0.02, 0.0)
    assert data.processor(518) == {"size": 592, "crop_size": 518}  # as 256 is to 224
    assert run.resolved["vitds"]["train"]["total_steps"] == 20_000
    assert (run.vitds.init_from.head, run.vitds.ema.decay, run.vitds.groups) == ("reset", average, [])
    for rate in ("0.03", "0.01"):
        assert rate in run.resolved["_about"]["sweep"]
