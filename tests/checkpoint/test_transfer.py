"""What a run takes of other weights, what it makes anew, and what it refuses, before anything is started."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.launching import ROOT
from vitds.checkpoint.transfer import InitFromSection, look_at, plan_transfer, source_of
from vitds.cli import main
from vitds.config import load_run_file, prepare
from vitds.errors import UserError
from vitds.models import ModelSection, ViTForImageClassification, build_config, label_names

THERE = ModelSection(width=32, depth=2, mlp_dim=64, num_heads=2, patch_size=2, image_size=8, num_classes=10, pool="map")


def model_of(section: ModelSection, names: tuple[str, ...] = ()) -> ViTForImageClassification:
    with torch.device("meta"):
        model = ViTForImageClassification(build_config(section))
    model.config.name_classes(names)
    return model


def planned(here: Any, head: str = "auto", names: Any = ((), ()), frozen: Any = (), there: Any = THERE) -> Any:
    """From `there` with classes named `names[0]` into `here` with `names[1]`."""
    old, new = model_of(there, names[0]), model_of(here, names[1])
    saved = json.loads(old.config.to_json_string(use_diff=False))
    return plan_transfer(Path("w"), old.shapes, saved, new.config, new.shapes, head, frozen)


TEN = tuple("abcdefghij")


@pytest.mark.parametrize(
    ("classes", "head", "names", "zero", "said"),
    [
        (10, "auto", (TEN, TEN), False, "classifier kept: of the same 10 classes"),
        (10, "auto", (TEN, TEN[::-1]), True, "of other classes (a, b, c, … there, j, i, h, … here)"),
        (10, "keep", (TEN, TEN[::-1]), False, "classifier kept, as vitds.init_from.head says"),
        (10, "reset", (TEN, TEN), True, "classifier starts at zero, as vitds.init_from.head says"),
        (7, "auto", (TEN, TEN[:7]), True, "classifier starts at zero: 10 classes there, 7 here"),
        (7, "reset", ((), ()), True, "classifier starts at zero: 10 classes there, 7 here"),
    ],
)
def test_a_classifier_is_kept_where_its_classes_are_known_to_be_the_same(classes, head, names, zero, said):
    found = planned(replace(THERE, num_classes=classes), head, names)
    assert found.fresh == ({"head.weight", "head.bias"} if zero else set())
    assert said in found.notes[0]
    assert not found.resampled
    assert found.kept | found.fresh == set(model_of(THERE).shapes)


@pytest.mark.parametrize(("names", "side"), [((TEN, ()), "here"), (((), TEN), "there"), (((), ()), "there")])
def test_equal_numbers_of_classes_without_names_are_asked_about(names, side):
    with pytest.raises(UserError, match=rf"init_from\.head: w has 10 classes.* no names {side} .*keep .*or reset"):
        planned(THERE, names=names)


def test_one_that_is_to_be_kept_and_cannot_be_is_refused():
    with pytest.raises(
        UserError, match=r"vitds\.init_from\.head: the classifier of w cannot be kept: 10 classes there, 7"
    ):
        planned(replace(THERE, num_classes=7), "keep")
    with pytest.raises(UserError, match="cannot be kept: the weights have none"):
        planned(THERE, "keep", there=replace(THERE, num_classes=0))
    assert planned(replace(THERE, num_classes=0), "keep").notes == ()  # there is none here: theirs is left


def test_what_was_added_to_the_logits_goes_into_a_bias_that_is_kept():
    there = replace(THERE, init_head_bias=-10.0)
    assert planned(THERE, "keep", there=there).bias_shift == -10
    assert planned(there, "keep", there=there).bias_shift == 0
    assert planned(THERE, "reset", there=there).bias_shift == 0


def test_a_frozen_classifier_that_starts_at_zero_is_refused():
    frozen = {"head.weight", "head.bias", "norm.weight"}
    with pytest.raises(UserError, match="freeze the classifier, and it would stay at zero: .*10 classes there, 7 here"):
        planned(replace(THERE, num_classes=7), frozen=frozen)
    assert not planned(THERE, "keep", frozen=frozen).fresh
    with pytest.raises(UserError, match="freeze the classifier"):
        planned(THERE, "reset", frozen={"head.weight"})  # zeros let no feature through, whatever the bias learns
    assert planned(THERE, "reset", frozen={"head.bias"}).fresh


def test_a_frozen_classifier_of_a_run_from_scratch_is_refused(tmp_path):
    run = load_run_file(
        str(ROOT / "ds_configs" / "digits.json"), [r'vitds.groups=[["head\\.weight", {"frozen": true}]]']
    )
    with pytest.raises(
        UserError, match="freeze the classifier, and it would stay at zero: the run begins from scratch"
    ):
        prepare(run)
    (tmp_path / "checkpoints" / "step-000000001").mkdir(parents=True)
    prepare(run, output=str(tmp_path))  # its own checkpoint says otherwise


def test_another_resolution_resamples_the_position_embedding():
    found = planned(replace(THERE, image_size=16), "reset")
    assert found.resampled == {"pos_embed"}
    assert found.notes[1] == "position embedding resampled from 16 to 64 patches"
    assert "pos_embed" in planned(replace(THERE, image_size=9), "reset").kept  # as many patches as at 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": 64}, "width: 32 there, 64 here"),
        ({"depth": 1}, "depth: 2 there, 1 here"),
        ({"depth": 3}, "depth: 2 there, 3 here"),
        ({"mlp_dim": 96}, "mlp_dim: 64 there, 96 here"),
        ({"num_heads": 4}, "num_heads: 2 there, 4 here"),
        ({"patch_size": 4}, "patch_size: 2 there, 4 here"),
        ({"pool": "gap"}, "pool: map there, gap here"),
        ({"pool": "token"}, "pool: map there, token here"),
    ],
)
def test_another_trunk_is_refused_and_both_sides_named(change, said):
    with pytest.raises(UserError, match=rf"^vitds\.init_from\.path: w holds another model than vitds\.model: {said}$"):
        planned(replace(THERE, **change))


def test_tensors_too_many_or_too_few_are_named():
    model = model_of(THERE)
    shapes = {name: shape for name, shape in model.shapes.items() if name != "norm.bias"} | {"norm.bais": (32,)}
    with pytest.raises(
        UserError, match=r"no tensor 'norm.bias' there \(did you mean 'norm.bais'\?\); tensor 'norm.bais' is"
    ):
        plan_transfer(Path("w"), shapes, {}, model.config, model.shapes)
    with pytest.raises(UserError, match="no tensor 'pos_embed' there"):
        plan_transfer(Path("w"), {"a": (1,)}, {}, model.config, model.shapes)
    shapes = model.shapes | {"pos_embed": (1, 17, 32)}
    with pytest.raises(UserError, match="cannot be resampled from 17 to 16 patches: not square"):
        plan_transfer(Path("w"), shapes, {}, model.config, model.shapes, "reset")


def test_names_that_nobody_chose_are_none():
    model = model_of(THERE)
    assert label_names(json.loads(model.config.to_json_string(use_diff=False))) == ()
    assert label_names(model.config.to_dict()) == ()
    assert label_names({"id2label": {str(i): f"LABEL_{i}" for i in range(12)}}) == ()
    assert label_names({"id2label": {str(i): f"c{i}" for i in range(12)}}) == tuple(f"c{i}" for i in range(12))
    model.config.name_classes(TEN[:4])  # fewer than the model has: which is the fifth?
    assert label_names(model.config.to_dict()) == ()


def write(directory: Path, section: ModelSection = THERE, names: tuple[str, ...] = ()) -> Path:
    """A Hugging Face directory."""
    directory.mkdir(parents=True)
    model = model_of(section, names)
    save_file({name: torch.zeros(shape) for name, shape in model.shapes.items()}, str(directory / "model.safetensors"))
    (directory / "config.json").write_text(model.config.to_json_string(use_diff=False))
    return directory


def test_the_headers_of_a_file_tell_what_will_change(tmp_path):
    path = write(tmp_path / "hf", names=TEN)
    same, larger = model_of(THERE, TEN), model_of(replace(THERE, image_size=12, num_classes=3))
    kept = "classifier kept: of the same 10 classes"
    assert look_at(InitFromSection(str(path)), same) == (f"weights from {path}", kept)
    file = path / "model.safetensors"
    assert look_at(InitFromSection(str(file)), same) == (f"weights from {file}", kept)
    assert look_at(InitFromSection(str(path)), larger)[1:] == (
        "classifier starts at zero: 10 classes there, 3 here", "position embedding resampled from 16 to 36 patches",
    )  # fmt: skip
    with pytest.raises(UserError, match="holds no model.ema"):
        look_at(InitFromSection(str(path), "ema"), same)
    for what, model in (("weights", model_of(replace(THERE, num_heads=4))), ("all", larger)):
        with pytest.raises(UserError, match=r"num_heads: 2 there, 4 here|cannot be kept: 10 classes there, 3 here"):
            look_at(InitFromSection(str(path), what), model)
    with pytest.raises(UserError, match="all goes on with the same model; position embedding resampled from 16 to 36"):
        look_at(InitFromSection(str(path), "all"), model_of(replace(THERE, image_size=12)))


@pytest.mark.parametrize(
    ("to", "output", "head"),
    [
        ("vitds", "it", "10 classes there, 3 here"),
        ("timm", "it", "10 classes there, 3 here"),
        ("big_vision", "it.npz", "10 classes there, 3 here"),
        ("safetensors", "it.safetensors", "10 classes there, 3 here"),
        ("siglip", "it", "the weights have none"),  # SigLIP's class for such a pooling has no classifier
    ],
)
def test_any_format_that_is_read_can_be_begun_with(to, output, head, tmp_path):
    path = tmp_path / output
    assert main(["convert", "--from", str(write(tmp_path / "hf")), "--to", to, "--output", str(path)]) == 0
    larger = model_of(replace(THERE, image_size=12, num_classes=3))
    assert look_at(InitFromSection(str(path)), larger) == (
        f"weights from {path}", f"classifier starts at zero: {head}", "position embedding resampled from 16 to 36 patches",
    )  # fmt: skip
    with pytest.raises(
        UserError, match=f"{re.escape(str(path))} holds another model than vitds.model: depth: 2 there, 3"
    ):
        look_at(InitFromSection(str(path)), model_of(replace(THERE, depth=3)))


def test_a_path_that_is_not_there_is_named_with_the_nearest(tmp_path):
    write(tmp_path / "digits")
    with pytest.raises(UserError, match=r"digts' does not exist \(did you mean 'digits'\?\)"):
        source_of(tmp_path / "digts")
    with pytest.raises(UserError, match="does not exist$"):
        source_of(tmp_path / "no" / "such")


@pytest.mark.parametrize("head", ["auto", "keep", "reset"])
def test_what_a_run_file_leaves_out_can_be_written_and_read_back(head, tmp_path):
    path = write(tmp_path / "hf", replace(THERE, width=64, depth=4, mlp_dim=128), TEN)
    overrides = [f"vitds.init_from.path={path}", f"vitds.init_from.head={head}"]
    run = load_run_file(str(ROOT / "ds_configs" / "finetune_digits.json"), overrides)
    resolved = tmp_path / "resolved.json"
    resolved.write_text(json.dumps(run.resolved))
    again = load_run_file(str(resolved))
    assert run.vitds.init_from == again.vitds.init_from == InitFromSection(str(path), head=head)
