"""What is saved opens again: transformers' Auto classes and pipeline, the image processor, the card's timm call."""

import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

import vitds
from tests.models.test_forward import POOLS, pictures, scrambled, small
from vitds.errors import UserError
from vitds.models import VARIANTS, ModelSection, ViTConfig, VitdsImageProcessor, build_config, model_card
from vitds.models.card import timm_call

assert vitds.__version__  # importing vitds is what registers the classes


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("pool", POOLS)
def test_auto_classes_open_what_was_saved(pool: str, tmp_path: Path) -> None:
    model = scrambled(small(pool, loss="softmax"))
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, ViTConfig)
    for name in ("shape", "image_size", "pool", "loss", "init_head_bias", "num_classes", "id2label"):
        assert getattr(config, name) == getattr(model.config, name), name
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.init_head_bias == -2.5
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    # Close, not equal: weights mapped from a file lie at other addresses, for which CPU kernels may sum otherwise.
    torch.testing.assert_close(loaded(pictures()).logits, model(pictures()).logits)
    assert "LABEL_" not in (tmp_path / "config.json").read_text()


def test_label_names_are_kept_and_counts_agree(tmp_path: Path) -> None:
    config = small("gap", num_classes=2)
    assert config.num_labels == config.num_classes == 2
    config.id2label = {0: "cat", 1: "dog"}
    config.save_pretrained(tmp_path)
    loaded = ViTConfig.from_pretrained(tmp_path)
    assert loaded.id2label == {0: "cat", 1: "dog"}
    assert loaded.num_classes == 2
    assert ViTConfig.from_pretrained(tmp_path, num_labels=3).num_classes == 3
    assert small("gap", num_classes=0).num_labels == 0
    assert config.hidden_size == 24


def test_processor_comes_back_equal_and_without_torchvision(tmp_path: Path) -> None:
    processor = VitdsImageProcessor(crop_size=38, size=50, resample="bicubic")
    processor.save_pretrained(tmp_path)
    loaded = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, VitdsImageProcessor)
    assert loaded.to_dict() == processor.to_dict()
    picture = noise(70, 90)
    assert np.array_equal(loaded(picture)["pixel_values"][0], processor(picture)["pixel_values"][0])


def test_processor_resizes_the_shortest_edge_and_crops_the_middle() -> None:
    processor = VitdsImageProcessor(crop_size=28)
    assert processor.size == {"shortest_edge": 32}
    picture = noise(64, 81)
    found = processor([picture, noise(30, 20)], return_tensors="pt")["pixel_values"]
    assert found.shape == (2, 3, 28, 28)
    assert found.dtype == torch.float32
    resized = np.asarray(picture.resize((32, 40), Image.Resampling.BILINEAR), dtype=np.float64)  # 81 · 32/64 = 40.5
    expected = resized[6:34, 2:30].transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-6)


def test_processor_reads_every_kind_of_image() -> None:
    processor = VitdsImageProcessor(crop_size=16, size=16)

    def seen(image: object) -> np.ndarray:
        return np.asarray(processor(image, return_tensors="np")["pixel_values"][0])

    picture = noise(16, 16)
    plain = seen(picture)
    array = np.asarray(picture)
    assert np.array_equal(seen(array), plain)
    assert np.array_equal(seen(torch.from_numpy(array.copy()).permute(2, 0, 1)), plain)
    grey = picture.convert("L")
    three = seen(Image.merge("RGB", [grey] * 3))
    assert np.array_equal(seen(grey), three)
    assert np.array_equal(seen(np.asarray(grey)), three)
    assert np.array_equal(seen(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)), three)
    assert np.array_equal(seen(picture.convert("CMYK")), plain)
    palette = picture.quantize(8)
    assert np.array_equal(seen(palette), seen(palette.convert("RGB")))
    hidden = picture.convert("RGBA")
    hidden.putalpha(0)
    assert np.array_equal(seen(hidden), np.ones_like(plain)), "transparent shows white"
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # "turn me back by 90° clockwise"
    assert np.array_equal(seen(turned), plain)


def test_processor_refuses_what_cannot_be() -> None:
    with pytest.raises(UserError, match="size: a shortest edge of 20 is too small for a crop of 32"):
        VitdsImageProcessor(crop_size=32, size=20)
    with pytest.raises(UserError, match="resample: 'cubic' is not known; allowed: nearest"):
        VitdsImageProcessor(resample="cubic")


def test_pipeline(tmp_path: Path) -> None:
    model = scrambled(small("map"))
    model.save_pretrained(tmp_path)
    processor = VitdsImageProcessor(crop_size=38)
    processor.save_pretrained(tmp_path)
    picture = noise(80, 60)
    best = transformers.pipeline("image-classification", model=str(tmp_path))(picture, top_k=1)[0]["label"]
    logits = model(**processor(picture, return_tensors="pt")).logits
    assert best == f"LABEL_{int(logits.argmax())}"


def test_card_gives_timms_call() -> None:
    def call(**section: object) -> str:
        return timm_call(build_config(ModelSection(**section)))  # type: ignore[arg-type]

    # These calls were run in timm 1.0.31: same names, same shapes, logits equal to 5e-7.
    assert call(num_classes=29593) == (
        "timm.create_model('vit_gigantic_patch14_224', img_size=224, class_token=False, global_pool='map', "
        "act_layer='gelu_tanh', num_classes=29593)"
    )
    assert call(variant="ViT-S/8", pool="token", image_size=96) == (
        "timm.create_model('vit_base_patch16_224', embed_dim=384, depth=12, num_heads=6, mlp_ratio=1536/384, "
        "patch_size=8, img_size=96, class_token=True, no_embed_class=True, global_pool='token', "
        "act_layer='gelu_tanh', num_classes=1000)"
    )
    assert "global_pool='avg', fc_norm=False" in call(variant="ViT-L/16", pool="gap")


def test_card_gives_an_mlp_ratio_that_timm_rounds_back() -> None:
    for width in (24, 56, 112, 392, 1664):
        for mlp in range(width, 6 * width, 197):
            text = timm_call(ViTConfig(width=width, depth=1, mlp_dim=mlp, num_heads=1, patch_size=16))
            found = re.search(r"mlp_ratio=([^,]+)", text)
            if found is not None:
                assert int(width * eval(found[1])) == mlp


def test_card_of_every_variant_says_what_a_reader_needs() -> None:
    for variant in VARIANTS:
        card = model_card(build_config(ModelSection(variant=variant, init_head_bias=-10.0)))
        assert f"# {variant}\n" in card
        assert "import vitds" in card
        assert "state['head.bias'] += -10.0" in card
        compile(re.findall(r"```python\n(.*?)```", card, re.S)[1], "card", "exec")
    assert "state['head.bias']" not in model_card(small("gap", num_classes=0))


def test_the_cards_timm_code_loads_the_weights_of_a_checkpoint_and_not_their_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run as it stands, on files as a checkpoint has them; only timm's model is replaced, by one of the same names."""
    model = scrambled(small("map", loss="sigmoid"))
    model.config.init_head_bias = -2.5
    state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    names = list(state)
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        save_file({name: state[name] for name in part}, tmp_path / f"model-0000{i}-of-00002.safetensors")
        save_file({name: state[name] + 1 for name in part}, tmp_path / f"model.ema-0000{i}-of-00002.safetensors")
    save_file({f"{name}.exp_avg": state[name] for name in names}, tmp_path / "optimizer-00001-of-00001.safetensors")
    loaded: dict[str, torch.Tensor] = {}

    class TimmModel:
        def load_state_dict(self, given: dict[str, torch.Tensor]) -> None:
            loaded.update(given)

    timm = types.ModuleType("timm")
    timm.create_model = lambda *_, **__: TimmModel()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    card = model_card(model.config).replace("DIRECTORY", str(tmp_path))
    exec(re.findall(r"```python\n(.*?)```", card, re.S)[1], {})
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(loaded[name], value - 2.5 if name == "head.bias" else value), name


def test_the_pipeline_of_a_model_without_classifier_says_so(tmp_path: Path) -> None:
    scrambled(small("map", num_classes=0)).save_pretrained(tmp_path)
    VitdsImageProcessor(crop_size=38).save_pretrained(tmp_path)
    pipeline = transformers.pipeline("image-classification", model=str(tmp_path))
    with pytest.raises(UserError, match="no classifier"):
        pipeline(noise(20, 20))
