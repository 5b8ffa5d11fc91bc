"""SigLIP's names, in and out, by the stock classes' own forward passes and state dicts."""

from __future__ import annotations

import pytest
import torch
from transformers import SiglipConfig, SiglipForImageClassification, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from tests.models.test_forward import pictures, scrambled, small
from vitds.errors import UserError
from vitds.models import ViTConfig, ViTForImageClassification
from vitds.models.formats import FORMATS, Conversion, config_of, format_of
from vitds.models.formats.siglip import lost, siglip_config

TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 38,
    "patch_size": 7,
}  # fmt: skip
State = dict[str, torch.Tensor]


def made(conversions: dict[str, Conversion], source: State) -> State:
    """What conversions make of a state, in memory."""
    out = {}
    for name, (shape, parts) in conversions.items():
        values = []
        for part in parts:
            pieces = [source[key] if rows is None else source[key][slice(*rows)] for key, rows in part.pieces]
            values.append(part.combine(pieces))
            assert values[-1].shape == part.shape, name
        out[name] = torch.cat(values) if len(values) > 1 else values[0]
        assert out[name].shape == shape, name
    return out


def state_of(model: torch.nn.Module, seed: int = 3) -> State:
    """The model's state, every number of which it is given here."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return dict(model.state_dict())


def shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def ours_of(state: State, saved: dict | None = None) -> ViTForImageClassification:
    """Our model of a state of SigLIP's."""
    siglip = format_of(shapes(state))
    assert siglip.name == "siglip"
    told = siglip.told(saved) if saved is not None else {"num_heads": 3}
    model = ViTForImageClassification(config_of(siglip.outline(shapes(state)), told)).eval()
    model.load_state_dict(made(siglip.incoming(shapes(state)), state))
    return model


def stock(config: ViTConfig, state: State) -> torch.nn.Module:
    """The stock class that our config.json names, with our tensors."""
    saved = siglip_config(config)
    kind = SiglipVisionModel if saved["model_type"] == "siglip_vision_model" else SiglipForImageClassification
    model = (
        kind(kind.config_class.from_dict(saved)) if kind is SiglipVisionModel else kind(SiglipConfig.from_dict(saved))
    )
    theirs = made(FORMATS["siglip"].outgoing(config), state)
    if kind is SiglipVisionModel:  # of 5.x, which drops the prefix as it loads a directory
        theirs = {name.removeprefix("vision_model."): value for name, value in theirs.items()}
    model.load_state_dict(theirs)
    return model.eval()


@torch.no_grad()
def test_a_map_model_is_a_stock_vision_model() -> None:
    model = scrambled(small("map")).eval()
    theirs = stock(model.config, dict(model.state_dict()))(pictures())
    tokens = model.forward_features(pictures())
    torch.testing.assert_close(theirs.last_hidden_state, tokens)
    torch.testing.assert_close(theirs.pooler_output, model(pictures(), features_only=True).logits)
    assert lost(model.config) == [
        "the classifier (5 classes) is left out: SigLIP has no classifier on its MAP head; pooler_output are the features it takes"
    ]
    assert lost(small("map", num_classes=0)) == lost(small("gap")) == []


@torch.no_grad()
def test_a_gap_model_is_a_stock_classifier_with_the_constant_in_its_bias() -> None:
    model = scrambled(small("gap")).eval()
    theirs = stock(model.config, dict(model.state_dict()))
    assert isinstance(theirs, SiglipForImageClassification)
    torch.testing.assert_close(theirs(pictures()).logits, model(pictures()).logits)
    bare = scrambled(small("gap", num_classes=0)).eval()
    theirs = stock(bare.config, dict(bare.state_dict()))
    assert isinstance(theirs, SiglipVisionModel)
    torch.testing.assert_close(theirs(pictures()).last_hidden_state.mean(1), bare(pictures()).logits)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["5.x", "4.x", "with the text tower", "with stored counts"])
def test_every_layout_of_a_vision_tower_is_read(layout: str) -> None:
    config = SiglipVisionConfig(**VISION)
    theirs = SiglipVisionModel(config).eval()
    state, saved = state_of(theirs), config.to_dict()
    if layout != "5.x":
        state = {f"vision_model.{name}": value for name, value in state.items()}
    if layout == "with the text tower":
        full = SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT))
        state, saved = {**state_of(full, 4), **state}, full.config.to_dict()
    if layout == "with stored counts":
        state["vision_model.embeddings.position_ids"] = torch.arange(25)[None]
    ours = ours_of(state, saved)
    assert (ours.config.pool, ours.config.num_classes, ours.config.image_size) == ("map", 0, 38)
    torch.testing.assert_close(ours(pictures()).logits, theirs(pictures()).pooler_output)
    torch.testing.assert_close(ours.forward_features(pictures()), theirs(pictures()).last_hidden_state)


@torch.no_grad()
def test_a_stock_classifier_is_a_gap_model_with_its_classes() -> None:
    theirs = SiglipForImageClassification(
        SiglipConfig(vision_config=VISION, text_config=TEXT, id2label={0: "cat", 1: "dog"})
    ).eval()
    theirs.config.architectures = ["SiglipForImageClassification"]
    ours = ours_of(state_of(theirs), theirs.config.to_dict())
    assert (ours.config.pool, ours.config.loss, ours.config.id2label) == ("gap", "softmax", {0: "cat", 1: "dog"})
    torch.testing.assert_close(ours(pictures()).logits, theirs(pictures()).logits)


@pytest.mark.parametrize(("pool", "classes"), [("map", 0), ("gap", 0), ("gap", 5)])
def test_out_and_in_again_is_the_same_to_the_bit(pool: str, classes: int) -> None:
    model = scrambled(small(pool, num_classes=classes, init_head_bias=0.0))
    state = dict(model.state_dict())
    back = ours_of(made(FORMATS["siglip"].outgoing(model.config), state), siglip_config(model.config))
    assert back.config.shape == model.config.shape
    for name, value in state.items():
        assert torch.equal(back.get_parameter(name), value), name


def test_what_siglip_cannot_hold_or_we_cannot_compute_is_refused() -> None:
    siglip = FORMATS["siglip"]
    with pytest.raises(UserError, match=r"pool: SigLIP has no \[class\] token"):
        siglip.outgoing(small("token"))
    saved = SiglipVisionConfig(**VISION, hidden_act="gelu").to_dict()
    with pytest.raises(UserError, match=r"hidden_act is 'gelu'; this model computes with 'gelu_pytorch_tanh'"):
        siglip.told(saved)
    state = state_of(SiglipVisionModel(SiglipVisionConfig(**VISION)))
    state["encoder.layers.0.mlp.fc3.bias"] = torch.zeros(3)
    with pytest.raises(UserError, match=r"'encoder.layers.0.mlp.fc3.bias': nothing here asks for it \(did you mean"):
        siglip.incoming(shapes(state))
    del state["encoder.layers.0.mlp.fc3.bias"], state["head.probe"]
    with pytest.raises(UserError, match="head.attention.in_proj_weight"):
        siglip.incoming(shapes(state))
    classified = {"model_type": "siglip", "architectures": ["SiglipForImageClassification"]}
    for names in (["cat"], {"cat": 0}):
        with pytest.raises(UserError, match=r"config\.json: id2label is .*, names by number were expected"):
            FORMATS["siglip"].told({**classified, "id2label": names})
    assert "id2label" not in FORMATS["siglip"].told({**classified, "architectures": 7, "id2label": {"0": "cat"}})
