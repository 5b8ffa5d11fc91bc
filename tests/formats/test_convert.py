"""`vitds convert`: what it writes is opened by others and computes the same; what cannot be is refused and leaves nothing."""

from __future__ import annotations

import resource
import shutil
import sys
import weakref
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tests.models.test_forward import POOLS, pictures, scrambled, small
from vitds.checkpoint.exchange import onnx_export
from vitds.checkpoint.exchange.convert import verified
from vitds.checkpoint.exchange.given import Given, given
from vitds.checkpoint.exchange.pretrained import open_model
from vitds.cli import main
from vitds.errors import UserError
from vitds.models import (
    Result,
    Training,
    VitdsImageProcessor,
    ViTForImageClassification,
    model_card,
    resample_position_embedding,
)
from vitds.models.formats import Piece

ENDINGS = {"safetensors": ".safetensors", "big_vision": ".npz", "onnx": ".onnx"}


def saved(directory: Path, pool: str = "map", **changes: object) -> ViTForImageClassification:
    """A directory as `from_pretrained` opens it, and its model."""
    model = scrambled(small(pool, **changes)).eval()
    model.save_pretrained(directory)
    VitdsImageProcessor(crop_size=38).save_pretrained(directory)
    return model


def converted(source: Path, to: str, *options: str) -> Path:
    """The path of a new output beside the source."""
    output = source.parent / f"out{ENDINGS.get(to, '')}"
    assert main(["convert", "--from", str(source), "--to", to, "--output", str(output), *options]) == 0
    return output


def left(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@torch.no_grad()
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("to", ["vitds", "safetensors", "timm", "big_vision"])
def test_there_and_back_computes_the_same(pool: str, to: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", pool)
    output = converted(tmp_path / "model", to, *(["--scan"] if to == "big_vision" else []))
    told = {} if to in ("vitds", "timm") else {"num_heads": 3, "image_size": 38}
    back = open_model(output, told=told)
    torch.testing.assert_close(back.model(pictures()).logits, model(pictures()).logits)
    if to != "vitds":
        assert back.model.config.init_head_bias == 0.0
        assert back.model.head.bias[0] == model.head.bias[0] - 2.5
    assert left(tmp_path) == {"model", output.name}


@torch.no_grad()
def test_a_directory_of_ours_is_a_checkpoint_s_model_part(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", id2label={0: "a", 1: "b", 2: "c", 3: "d", 4: "e"})
    output = converted(tmp_path / "model", "vitds")
    assert left(output) == {"config.json", "preprocessor_config.json", "README.md", "model.safetensors"}
    again = transformers.AutoModelForImageClassification.from_pretrained(output)
    for name in ("shape", "image_size", "pool", "loss", "init_head_bias", "num_classes", "id2label", "architectures"):
        assert getattr(again.config, name) == getattr(model.config, name), name
    for name, value in model.named_parameters():
        assert torch.equal(again.get_parameter(name), value), name
    assert VitdsImageProcessor.from_pretrained(output).to_dict() == VitdsImageProcessor(crop_size=38).to_dict()


def test_what_a_card_says_of_the_training_stays_with_the_same_weights(tmp_path: Path) -> None:
    """Data, steps and results are of the weights that a run saved: not of an average's, nor of a new classifier's."""
    model = saved(tmp_path / "model")
    facts = Training(["Trained on digits"], {"steps": "7 of 9"}, [Result("digits", "top-1", 0.5)])
    card = model_card(model.config, facts) + "\nOur own words.\n"
    (tmp_path / "model" / "README.md").write_text(card)
    save_file(load_file(tmp_path / "model" / "model.safetensors"), tmp_path / "model" / "model.ema.safetensors")
    for options, same in (([], True), (["--dtype", "bf16"], True), (["--ema"], False), (["--classes", "2"], False),
                          (["--image-size", "45"], False)):  # fmt: skip
        output = converted(tmp_path / "model", "vitds", *options)
        written = (output / "README.md").read_text()
        assert (written == card) == same, options
        assert ("7 of 9" in written) == same, options
        assert ("A Vision Transformer trained with vitds" in written) == same, options
        shutil.rmtree(output)


def test_a_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is read, no more is alive than one tensor of the target is made of, in pieces of the source."""
    model = saved(tmp_path / "model", depth=12)
    sizes = [parameter.numel() for parameter in model.parameters()]
    alive, most, read = 0, 0, Given.read

    def counted(self: Given, piece: Piece) -> torch.Tensor:
        nonlocal alive, most
        tensor = read(self, piece).clone()
        number = tensor.numel()
        alive += number
        most = max(most, alive)

        def gone() -> None:
            nonlocal alive
            alive -= number

        weakref.finalize(tensor.untyped_storage(), gone)
        return tensor

    monkeypatch.setattr(Given, "read", counted)
    for to, options in (
        ("vitds", []),
        ("safetensors", []),
        ("siglip", []),
        ("timm", []),
        ("big_vision", []),
        ("big_vision", ["--scan"]),
    ):
        output = converted(tmp_path / "model", to, *options)
        shutil.rmtree(output) if output.is_dir() else output.unlink()
        assert max(sizes) <= most <= 2 * max(sizes) < sum(sizes) / 5, (to, most, max(sizes), sum(sizes))
        most = 0


@torch.no_grad()
@pytest.mark.parametrize("options", [[], ["--file-gb", "0.00002"]], ids=["one file", "shards"])
def test_stock_siglip_opens_what_is_written(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = saved(tmp_path / "model")
    output = converted(tmp_path / "model", "siglip", "--verify", *options)
    said = capsys.readouterr().out
    assert "note: the classifier (5 classes) is left out" in said
    assert "verified: written, by SiglipVisionModel" in said
    assert (
        (len(list(output.glob("*.safetensors"))) > 1)
        == (output / "model.safetensors.index.json").exists()
        == bool(options)
    )
    theirs, report = transformers.SiglipVisionModel.from_pretrained(output, output_loading_info=True)
    assert not any(report.values())
    found = theirs.eval()(pictures())
    torch.testing.assert_close(found.pooler_output, model(pictures(), features_only=True).logits)
    torch.testing.assert_close(found.last_hidden_state, model.forward_features(pictures()))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (86, 129, 3), dtype=np.uint8))
    pixels = [np.asarray(p(picture)["pixel_values"][0]) for p in (AutoImageProcessor.from_pretrained(output), VitdsImageProcessor(crop_size=38))]  # fmt: skip
    np.testing.assert_allclose(*pixels, atol=1e-6)
    back = open_model(output).model
    assert (back.config.num_heads, back.config.image_size, back.config.num_classes) == (3, 38, 0)
    torch.testing.assert_close(back(pictures()).logits, model(pictures(), features_only=True).logits)


@torch.no_grad()
def test_stock_siglip_classifier_of_a_gap_model(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "gap", loss="softmax", id2label={0: "a", 1: "b", 2: "c", 3: "d", 4: "e"})
    output = converted(tmp_path / "model", "siglip")
    theirs = transformers.SiglipForImageClassification.from_pretrained(output).eval()
    torch.testing.assert_close(theirs(pictures()).logits, model(pictures()).logits)
    back = open_model(output).model.config
    assert (back.loss, back.id2label, back.pool) == ("softmax", model.config.id2label, "gap")


@torch.no_grad()
def test_onnx_takes_any_batch_and_names_no_place(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = saved(tmp_path / "model")
    output = converted(tmp_path / "model", "onnx")
    assert "note: onnxruntime against the model, batches of 1 and 3: maximum difference" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(output)
    logits, features = session.run(["logits", "features"], {"pixel_values": pictures(4).numpy()})
    np.testing.assert_allclose(logits, model(pictures(4)).logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features, model(pictures(4), features_only=True).logits, rtol=1e-4, atol=1e-5)
    assert b".py" not in output.read_bytes()
    assert left(tmp_path) == {"model", "out.onnx"}


def test_weights_of_a_large_graph_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnx_export, "EXTERNAL_BYTES", 1000)
    saved(tmp_path / "model", "gap", num_classes=0)
    output = converted(tmp_path / "model", "onnx")
    assert left(tmp_path) == {"model", "out.onnx", "out.onnx.data"}
    assert [each.name for each in onnxruntime.InferenceSession(output).get_outputs()] == ["features"]


def test_a_graph_that_computes_something_else_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnx_export, "BOUND", 0.0)
    saved(tmp_path / "model")
    assert (
        main(["convert", "--from", str(tmp_path / "model"), "--to", "onnx", "--output", str(tmp_path / "o.onnx")]) == 2
    )
    assert "onnxruntime's outputs differ from the model's by" in capsys.readouterr().err
    assert left(tmp_path) == {"model"}


@torch.no_grad()
def test_other_classes_and_another_resolution(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = saved(tmp_path / "model")
    output = converted(tmp_path / "model", "vitds", "--classes", "3", "--image-size", "56", "--verify")
    said = capsys.readouterr().out
    assert "changed: the classifier has 3 classes and starts at zero; there were 5\n" in said
    assert "changed: position embedding resampled from 25 to 64 patches\n" in said
    opened = open_model(output)
    assert (opened.model.config.num_classes, opened.model.config.image_size) == (3, 56)
    assert opened.processor.crop_size == {"height": 56, "width": 56}
    assert torch.equal(opened.model.pos_embed, resample_position_embedding(model.pos_embed, 64))
    assert not opened.model.head.weight.any()
    assert opened.model(pictures(2, 56)).logits.shape == (2, 3)


def test_the_average_is_what_ema_takes(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    save_file(
        {name: value.detach() + 1 for name, value in model.named_parameters()},
        tmp_path / "model" / "model.ema.safetensors",
    )
    output = converted(tmp_path / "model", "safetensors", "--ema")
    assert torch.equal(load_file(output)["norm.weight"], model.norm.weight + 1)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bits_are_half_the_size(dtype: str, tmp_path: Path) -> None:
    saved(tmp_path / "model")
    output = converted(tmp_path / "model", "siglip", "--dtype", dtype, "--verify")
    with safe_open(output / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {{"bf16": "BF16", "fp16": "F16"}[dtype]}  # noqa: SIM118


def refused(tmp_path: Path, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """What is said of arguments that are refused, on the error stream alone; nothing is left."""
    before = left(tmp_path)
    capsys.readouterr()
    assert main(["convert", *arguments]) == 2
    assert left(tmp_path) == before
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_bad_arguments_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*arguments: str, source: str = "nothing") -> str:
        return refused(tmp_path, capsys, "--from", str(tmp_path / source), *arguments)

    out = str(tmp_path / "out")
    (tmp_path / "there").mkdir()
    assert "--to: 'sig_lip' is not known (did you mean 'siglip'?); allowed: vitds, " in said("--to", "sig_lip", "--output", out)  # fmt: skip
    assert "there is there already; name another, or move it away" in said("--to", "vitds", "--output", str(tmp_path / "there"))  # fmt: skip
    assert "is to be one file; its name ends in .npz" in said("--to", "big_vision", "--output", out)
    assert "is to be a directory" in said("--to", "siglip", "--output", out + ".npz")
    assert "there is no directory" in said("--to", "siglip", "--output", out + "/deeper")
    assert "--scan: is of big_vision's layout" in said("--to", "siglip", "--output", out, "--scan")
    assert "--dtype: onnx is written in fp32 only" in said("--to", "onnx", "--output", out + ".onnx", "--dtype", "bf16")
    assert "'nothing': no such file" in said("--to", "vitds", "--output", out).replace(str(tmp_path) + "/", "'").replace("nothing:", "nothing':")  # fmt: skip
    assert "--set: 'heads' is not known" in said("--to", "vitds", "--output", out, "--set", "heads=3")
    assert "--file-gb: inf is not possible" in said("--to", "vitds", "--output", out, "--file-gb", "inf")
    (tmp_path / "there" / "config.json").write_text("{}")
    assert "describes another model" in said("--to", "safetensors", "--output", f"{tmp_path}/there/o.safetensors")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = said("--to", "onnx", "--output", out + ".onnx")
    assert message == "vitds: --to onnx: needs onnxruntime; pip install 'vitds[onnx]'\n"


def test_what_a_format_cannot_hold_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = saved(tmp_path / "model", "token")
    source, out = str(tmp_path / "model"), str(tmp_path / "out")
    assert "SigLIP has no [class] token" in refused(
        tmp_path, capsys, "--from", source, "--to", "siglip", "--output", out
    )
    state = {name: value.detach().clone() for name, value in model.named_parameters()}
    state["blocks.1.mlp.fc2.weight"][3, 4] = 7e4
    save_file(state, tmp_path / "model" / "model.safetensors")
    message = refused(tmp_path, capsys, "--from", source, "--to", "vitds", "--output", out, "--dtype", "fp16")
    assert "tensor 'blocks.1.mlp.fc2.weight' has a value of 7e+04, and fp16 ends at 65504" in message


@pytest.mark.parametrize("to", ["vitds", "big_vision"])
def test_a_disk_that_is_full_is_said_and_nothing_is_left(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    saved(tmp_path / "model")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    output = tmp_path / f"out{ENDINGS.get(to, '')}"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        message = refused(tmp_path, capsys, "--from", str(tmp_path / "model"), "--to", to, "--output", str(output))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{output}: could not be written: File too large" in message


def test_verification_sees_another_model(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    output = converted(tmp_path / "model", "siglip")
    state = load_file(output / "model.safetensors")
    width = state["vision_model.encoder.layers.1.self_attn.q_proj.bias"].shape[0]
    state["vision_model.head.attention.in_proj_bias"][2 * width] += 0.5  # a value's; of a key's softmax would not know
    save_file(state, output / "model.safetensors")
    with pytest.raises(
        UserError, match="--verify: features of what is written, by SiglipVisionModel, differ from ours by"
    ):
        list(verified(given(tmp_path / "model"), output, Namespace(to="siglip", dtype="fp32", ema=False)))


def test_one_class_and_another_loss_are_what_transformers_takes(tmp_path: Path) -> None:
    saved(tmp_path / "model", "gap", loss="softmax")
    one = converted(tmp_path / "model", "vitds", "--classes", "1", "--verify")
    assert transformers.AutoConfig.from_pretrained(one).problem_type is None
    stock = tmp_path / "stock"
    assert main(["convert", "--from", str(one), "--to", "siglip", "--output", str(stock), "--verify"]) == 0
    assert transformers.AutoConfig.from_pretrained(stock).num_labels == 1
    assert open_model(tmp_path / "model").model.config.problem_type == "single_label_classification"
    told = open_model(tmp_path / "model", told={"loss": "sigmoid"})
    assert told.model.config.problem_type == "multi_label_classification"
