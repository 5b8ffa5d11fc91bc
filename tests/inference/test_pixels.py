"""Evaluation in training, the saved image processor and transformers' pipeline see the same pixels, bit for bit."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.inference.kinds import ANY, KINDS, Held, encoded, saved, tiny
from vitds.data import DataSection, EvalLoader, SourceSection, to_model_range
from vitds.data.images import decode
from vitds.errors import UserError
from vitds.models import VitdsImageProcessor

SIZE = 16
LISTS = (
    None,
    [],
    ["resize"],
    ["central_crop"],
    [{"resize_small": {"size": 23}}, "central_crop"],
    [{"resize": {"size": 18}}, "central_crop"],
    [{"resize_small": {"size": SIZE}}],
)
NOT_ONE_RESIZE = (
    [{"central_crop": {"size": 20}}, "resize"],
    ["random_crop"],
    [{"resize_small": {"size": 40}}, {"resize_small": {"size": 20}}, "central_crop"],
    [{"resize": {"size": 30}}, {"central_crop": {"size": 20}}],
)


def evaluated(data: list[bytes], transforms: list | None) -> torch.Tensor:
    """(N, 3, S, S) as evaluation in training shows them to the model."""
    source = Held([(one, 0, str(i)) for i, one in enumerate(data)], ["a"])
    section = DataSection(ANY, SourceSection("synthetic", transforms=transforms))
    loader = EvalLoader(source, section, image_size=SIZE, num_classes=1, batch=len(data), rank=0, world_size=1)
    (batch,) = list(loader)
    assert batch.is_real.all(), loader.bad_samples
    return to_model_range(batch.images, "cpu")


def processor_of(transforms: list | None) -> VitdsImageProcessor:
    """As it comes back from the JSON beside a checkpoint."""
    section = DataSection(ANY, SourceSection("synthetic", transforms=transforms))
    written = VitdsImageProcessor(**section.processor(SIZE)).to_json_string()
    return VitdsImageProcessor.from_dict(json.loads(written))


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> list:
    """transformers' pipeline for each of LISTS."""
    model, made = tiny(), []
    for i, transforms in enumerate(LISTS):
        path = saved(tmp_path_factory.mktemp(str(i)), model, processor_of(transforms))
        made.append(transformers.pipeline("image-classification", model=path))
    return made


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    wide=st.sampled_from((1, 1, 1, 30)),
    chosen=st.integers(0, len(LISTS) - 1),
    seed=st.integers(0, 9),
)
def test_the_same_pixels(tmp_path_factory, pipelines, kind, width, height, wide, chosen, seed) -> None:
    data = encoded(kind, width * wide, height, seed)
    transforms = LISTS[chosen]
    try:
        expected = evaluated([data], transforms)
    except UserError:  # these transforms do not make it the model's size
        if transforms == ["central_crop"]:
            with pytest.raises(UserError, match="is smaller than the 16×16"):
                processor_of(transforms)(Image.open(io.BytesIO(data)))
        return
    path = tmp_path_factory.mktemp("image") / "image"
    path.write_bytes(data)
    processor = processor_of(transforms)
    for found in (
        processor(Image.open(io.BytesIO(data)), return_tensors="pt")["pixel_values"],
        processor(decode(data), return_tensors="pt")["pixel_values"],  # upright already, and not turned twice
        pipelines[chosen].preprocess(str(path))["pixel_values"],
        pipelines[chosen].preprocess(path)["pixel_values"],
        pipelines[chosen].preprocess(Image.open(io.BytesIO(data)))["pixel_values"],
    ):
        assert torch.equal(found, expected)


def test_every_kind_is_seen_to_matter() -> None:
    """transformers' own conversion would give other pixels for what is transparent or of 16 bits."""
    from transformers.image_utils import load_image

    differing = set()
    for kind in KINDS:
        data = encoded(kind, 31, 40, 1)
        theirs = processor_of(None)(load_image(Image.open(io.BytesIO(data))), return_tensors="pt")["pixel_values"]
        if not torch.equal(theirs, evaluated([data], None)):
            differing.add(kind)
    assert differing == {"LA", "RGBA", "P transparent", "I;16", "webp", "turned alpha"}


@pytest.mark.parametrize("transforms", LISTS, ids=str)
def test_what_can_be_done_is_saved_and_said_nowhere(transforms: list | None) -> None:
    assert "evaluation_transforms" not in processor_of(transforms).to_dict()


@pytest.mark.parametrize("transforms", NOT_ONE_RESIZE, ids=str)
def test_what_cannot_be_done_is_said(transforms: list) -> None:
    processor = processor_of(transforms)
    assert processor.evaluation_transforms == transforms
    assert (processor.size, processor.crop_size["height"]) == ({"shortest_edge": 18}, SIZE)


def test_grey_arrays_come_out_as_their_files_do() -> None:
    """The embedded digits are arrays."""
    grey = Image.open(io.BytesIO(encoded("L", 30, 22, 5)))
    array = np.asarray(grey)
    source = Held([(array, 0, "0")], ["a"])
    loader = EvalLoader(source, DataSection(ANY, ANY), image_size=SIZE, num_classes=1, batch=1, rank=0, world_size=1)
    (batch,) = list(loader)
    found = processor_of(None)(grey, return_tensors="pt")["pixel_values"]
    assert torch.equal(to_model_range(batch.images, "cpu"), found)
    assert np.array_equal(np.asarray(processor_of(None).fitted(array).convert("RGB")), batch.images[0].permute(1, 2, 0))


def test_other_levels_are_those_of_the_formula() -> None:
    processor = VitdsImageProcessor(SIZE, SIZE, image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225))
    pixels = torch.arange(256, dtype=torch.float64)
    image = Image.fromarray(pixels.to(torch.uint8).view(16, 16).numpy())
    found = processor(image, return_tensors="pt")["pixel_values"][0]
    for channel, (mean, std) in enumerate(zip(processor.image_mean, processor.image_std, strict=True)):
        expected = (pixels / 255 - mean) / std
        assert torch.allclose(found[channel].double().flatten(), expected, atol=1e-6, rtol=1e-6)


def test_a_crop_alone_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded("RGB", 40, 50, 0))
    processor = processor_of(["central_crop"])
    assert processor.do_resize is False
    found = processor(Image.open(tmp_path / "a.png"), return_tensors="np")["pixel_values"][0]
    expected = np.asarray(Image.open(tmp_path / "a.png"))[17:33, 12:28].astype(np.float32) / np.float32(127.5) - 1
    assert np.array_equal(found, expected.transpose(2, 0, 1))
