"""timm's names, in and out: against a list of what timm itself makes, and against timm where it can be imported.

timm_shapes.json was written with timm 1.0.31 outside this repository: its import of torchvision was met by empty
classes of the names it asks for, `timm.create_model` was called with the arguments recorded beside each list, and names
and shapes are those of `state_dict()`. On the same day the same three calls, weights loaded with strict names, gave our
logits to 7e-7 (fp32) and 2e-15 (fp64) (docs/formats.md).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.formats.test_siglip import made, shapes, state_of
from tests.models.test_forward import POOLS, pictures, scrambled, small
from vitds.checkpoint.exchange.pretrained import open_model
from vitds.cli import main
from vitds.errors import UserError
from vitds.models import ViTConfig, VitdsImageProcessor, ViTForImageClassification
from vitds.models.card import timm_call
from vitds.models.formats import FORMATS, config_of, format_of
from vitds.models.formats.timm import timm_arguments, timm_config

RECORDED = json.loads((Path(__file__).parent / "timm_shapes.json").read_text())["models"]


def recorded(tag: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in RECORDED[tag]["shapes"].items()}


@pytest.mark.parametrize("pool", POOLS)
def test_what_goes_out_is_what_timm_makes_by_name_and_shape(pool: str) -> None:
    config = small(pool)
    assert timm_call(config) == RECORDED[pool]["call"]
    assert {name: made.shape for name, made in FORMATS["timm"].outgoing(config).items()} == recorded(pool)
    state = dict(scrambled(config).state_dict())
    theirs = made(FORMATS["timm"].outgoing(config), state)
    for name, value in state.items():
        assert torch.equal(theirs[name], value - 2.5 if name == "head.bias" else value), name


@torch.no_grad()
def test_a_class_token_s_position_is_added_to_the_token() -> None:
    """timm's default: the token is put before the patches first, then every one of them gets its position."""
    there = recorded("classic")
    assert there["pos_embed"] == (1, 26, 24)
    timm = format_of(there)
    assert timm.name == "timm"
    generator = torch.Generator().manual_seed(5)
    state = {name: torch.randn(shape, generator=generator) for name, shape in there.items()}
    model = ViTForImageClassification(config_of(timm.outline(there), {"num_heads": 3, "image_size": 38})).eval()
    model.load_state_dict(made(timm.incoming(there), state))
    stem = model.patch_embed(pictures())
    by_timm = torch.cat([state["cls_token"].expand(2, -1, -1), stem], dim=1) + state["pos_embed"]
    for block in model.blocks:
        by_timm = block(by_timm)
    torch.testing.assert_close(model.forward_features(pictures()), model.norm(by_timm))


def test_models_that_compute_something_else_are_refused_with_the_reason() -> None:
    timm = FORMATS["timm"]
    with pytest.raises(UserError, match=r"'fc_norm.weight': it normalises after the pooling, this model before it"):
        timm.incoming(recorded("avg with fc_norm"))
    for name, reason in (("blocks.1.ls1.gamma", "LayerScale"), ("blocks.0.attn.q_norm.weight", "queries and keys"), ("reg_token", "registers")):  # fmt: skip
        with pytest.raises(UserError, match=f"'{name}': .*{reason}"):
            timm.incoming({**recorded("classic"), name: (24,)})
    with pytest.raises(UserError, match="'head.wait': nothing here asks for it"):
        timm.incoming({**recorded("classic"), "head.wait": (5, 24)})


def test_the_config_beside_the_weights_tells_heads_size_and_classes() -> None:
    config = small("token")
    saved = json.loads(json.dumps(timm_config(config, VitdsImageProcessor(crop_size=38).to_dict())))
    assert FORMATS["timm"].told(saved) == {"num_heads": 3, "image_size": 38, "pool": "token"}
    assert saved["architecture"] == "vit_base_patch16_224"
    assert int(24 * saved["model_args"]["mlp_ratio"]) == 40
    hub = {"architecture": "vit_large_patch16_384", "num_classes": 2, "pretrained_cfg": {"input_size": [3, 384, 384], "label_names": ["a", "b"]}}  # fmt: skip
    assert FORMATS["timm"].told(hub) == {"num_heads": 16, "image_size": 384, "id2label": {0: "a", 1: "b"}}
    assert FORMATS["timm"].told({"model_type": "vit"}) == {}
    assert timm_arguments(ViTConfig())[0] == "vit_gigantic_patch14_224"


def test_what_timm_says_of_pooling_and_colours_is_heard(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A [class] token that the mean over the tokens passes over, and ImageNet's mean: neither shows in weights."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    config = small("token")
    saved = timm_config(config, VitdsImageProcessor(crop_size=38, image_mean=mean, image_std=std).to_dict())
    save_file(
        made(FORMATS["timm"].outgoing(config), dict(scrambled(config).state_dict())), tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps(saved))
    found = open_model(tmp_path)
    assert (found.processor.image_mean, found.processor.image_std) == (list(mean), list(std))
    assert main(["convert", "--from", str(tmp_path), "--to", "big_vision", "--output", f"{tmp_path}/out.npz"]) == 0
    assert "note: its images are normalised by mean [0.485, 0.456, 0.406]" in capsys.readouterr().out
    saved["model_args"]["global_pool"] = "avg"
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="pool: 'gap' is told, and the weights have 'token'"):
        open_model(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("pool", [*POOLS, "classic"])
def test_timm_s_own_forward_pass(pool: str) -> None:
    timm = pytest.importorskip("timm", exc_type=ImportError)
    theirs = eval(RECORDED[pool]["call"], {"timm": timm}).eval()
    state = state_of(theirs)
    assert shapes(state) == recorded(pool)
    found = format_of(shapes(state))
    model = ViTForImageClassification(config_of(found.outline(shapes(state)), {"num_heads": 3, "image_size": 38}))
    model.load_state_dict(made(found.incoming(shapes(state)), state))
    torch.testing.assert_close(model.eval()(pictures()).logits, theirs(pictures()))
