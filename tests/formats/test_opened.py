"""`open_model`: the same model from a run, a checkpoint, a Hugging Face directory and a file of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.checkpoint_ranks import TRAINING_STATE
from tests.launching import environment
from tests.models.test_forward import scrambled
from vitds.checkpoint import Saver
from vitds.checkpoint.exchange.pretrained import open_model
from vitds.checkpoint.exchange.weights import WeightsFile
from vitds.checkpoint.format import EMA, MODEL, OPTIMIZER
from vitds.errors import UserError
from vitds.layout import Shard
from vitds.models import ViTConfig, VitdsImageProcessor, ViTForImageClassification

NAMES = {0: "cat", 1: "dog", 2: "fox"}


@pytest.fixture
def model() -> ViTForImageClassification:
    config = ViTConfig(
        width=24, depth=2, mlp_dim=40, num_heads=3, patch_size=4, image_size=18, init_head_bias=-3.0, loss="softmax",
        id2label=NAMES, label2id={name: i for i, name in NAMES.items()},
    )  # fmt: skip
    return scrambled(config)


@pytest.fixture
def run(tmp_path: Path, model: ViTForImageClassification) -> Path:
    """A run's directory with two checkpoints, each with an average; the older has other weights."""
    for step, factor in ((3, 0.5), (12, 1.0)):
        shards = [Shard(n, tuple(p.shape), p.detach().reshape(-1) * factor) for n, p in model.named_parameters()]
        average = [Shard(shard.name, shard.shape, shard.data + 1) for shard in shards]
        extra = {
            "config.json": model.config.to_json_string(use_diff=False),
            "preprocessor_config.json": VitdsImageProcessor(18, 25).to_json_string(),
        }
        state = {**TRAINING_STATE, "step": step}
        saver = Saver(tmp_path / "run" / "checkpoints")
        saver.begin(step, {MODEL: shards, OPTIMIZER: [], EMA: average}, state, extra)
        saver.commit()
    return tmp_path / "run"


def test_a_runs_newest_checkpoint(run: Path, model: ViTForImageClassification) -> None:
    opened = open_model(run)
    assert (opened.step, opened.format, opened.path) == (12, "vitds", run / "checkpoints" / "step-000000012")
    assert not opened.model.training
    assert (opened.processor.size, opened.processor.crop_size["height"]) == ({"shortest_edge": 25}, 18)
    config = opened.model.config
    assert (config.id2label, config.loss, config.init_head_bias) == (NAMES, "softmax", -3.0)
    for name, value in opened.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    pixels = torch.randn(2, 3, 18, 18)
    assert torch.equal(opened.model(pixels).logits, model.eval()(pixels).logits)


def test_an_older_one_its_average_and_another_precision(run: Path, model: ViTForImageClassification) -> None:
    half = open_model(run / "checkpoints" / "step-000000003", kind=EMA, dtype=torch.bfloat16)
    assert half.step == 3
    for name, value in half.model.state_dict().items():
        assert torch.equal(value, (model.state_dict()[name] * 0.5 + 1).bfloat16()), name


def test_what_transformers_saves_and_one_file_of_it(tmp_path: Path, model: ViTForImageClassification) -> None:
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "one")
    paths = (tmp_path / "hf", tmp_path / "one", tmp_path / "one" / "model.safetensors")
    for path in paths:
        opened = open_model(path)
        assert (opened.step, opened.model.config.num_heads, opened.model.config.id2label) == (None, 3, NAMES)
        assert torch.equal(opened.model.state_dict()["head.bias"], model.state_dict()["head.bias"])


def test_a_file_by_itself_holds_the_whole_bias_and_is_told_its_heads(
    tmp_path: Path, model: ViTForImageClassification
) -> None:
    save_file({name: value.detach() for name, value in model.named_parameters()}, tmp_path / "bare.safetensors")
    with pytest.raises(
        UserError, match=r"bare\.safetensors: num_heads: the weights do not tell it.*say --set num_heads=N"
    ):
        open_model(tmp_path / "bare.safetensors")
    opened = open_model(tmp_path / "bare.safetensors", told={"num_heads": 3, "image_size": 18})
    assert opened.model.config.init_head_bias == 0.0
    assert opened.processor.crop_size["height"] == 18


def test_heads_that_a_configuration_says_are_not_told_otherwise(
    tmp_path: Path, model: ViTForImageClassification
) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"num_heads: 4 is told, and its config\.json has 3"):
        open_model(tmp_path, told={"num_heads": 4})
    with pytest.raises(UserError, match=r"holds no model\.ema, no average of its weights"):
        open_model(tmp_path, kind=EMA)


def without(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        state = load_file(path / "model.safetensors")
        save_file({key: value for key, value in state.items() if key != name}, path / "model.safetensors")

    return change


def said(word: str, value: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, word: value}))

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("blocks.1.norm1.bias"), "no tensor 'blocks.1.norm1.bias' there"),
        (without("head.bias"), "no tensor 'head.bias' there"),
        (said("width", 48), "width: 48 is told, and the weights have 24"),
        (said("num_heads", 5), "num_heads: 5 heads do not divide the width 24"),
        (said("num_heads", "3"), "config.json: num_heads: '3' is not possible; expected int"),
        (said("init_head_bias", "x"), "config.json: init_head_bias: 'x' is not possible; expected int or float"),
        (
            said("id2label", {"0": 1, "1": 2, "2": 3}),
            "config.json: id2label: {'0': 1, '1': 2, '2': 3} is not possible; expected names",
        ),
        (said("image_size", 30), "image_size: 30 is told, and the weights have 4×4 patches of 4 pixels"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(
    tmp_path: Path, model: ViTForImageClassification, change: Callable[[Path], None], words: str
) -> None:
    model.save_pretrained(tmp_path / "hf")
    change(tmp_path / "hf")
    with pytest.raises(UserError) as refused:
        open_model(tmp_path / "hf")
    assert str(refused.value).startswith(str(tmp_path / "hf"))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("words", [{"crop_size": "a"}, {"crop_size": 18, "size": 9}, {"crop_size": 18, "image_std": [0.5]}, {"crop_size": 18, "image_std": [0, 0, 0]}])  # fmt: skip
def test_an_image_processor_that_cannot_be_is_one_clear_line(
    tmp_path: Path, model: ViTForImageClassification, words: dict[str, object]
) -> None:
    model.save_pretrained(tmp_path)
    saved = {"image_processor_type": "VitdsImageProcessor", **words}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"preprocessor_config\.json: not what an image processor is made of"):
        open_model(tmp_path)


def test_another_model_s_processor_says_mean_and_deviation(tmp_path: Path, model: ViTForImageClassification) -> None:
    model.save_pretrained(tmp_path)
    levels = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    saved = {"image_processor_type": "CLIPImageProcessor", "crop_size": {"height": 18, "width": 18}, **levels}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(saved))
    processor = open_model(tmp_path).processor
    assert {"image_mean": processor.image_mean, "image_std": processor.image_std} == levels


def test_a_variant_that_is_told_is_compared(tmp_path: Path, model: ViTForImageClassification) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="width: 1024 is told, and the weights have 24"):
        open_model(tmp_path, told={"variant": "ViT-L/16"})


def test_places_that_hold_no_model(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="a run's directory without any checkpoint"):
        open_model(tmp_path / "run")
    with pytest.raises(UserError, match="no such file or directory"):
        open_model(tmp_path / "none")
    (tmp_path / "model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match=r"model\.bin is a pickle"):
        WeightsFile(tmp_path / "model.bin")


def test_deepspeed_is_not_imported() -> None:
    code = "import sys, vitds.checkpoint.exchange.pretrained; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0
