"""Transforms: the crop's law against a distribution computed another way, sizes, shifts, and the run file's list."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from vitds.data.randomness import augmentation_rng
from vitds.data.transforms import (
    build_transforms,
    central_crop,
    eval_default,
    flip_lr,
    inception_crop,
    random_crop,
    random_shift,
    resize_small,
    sample_crop,
)
from vitds.errors import UserError

RNG = augmentation_rng(0, 0)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def crop_law(width, height, area_min, aspects):
    """P(crop height, crop width), from the description of the sampler: an average over a grid of aspect ratios.

    For each aspect the heights allowed are those between the roundings of √(area/aspect) whose crop fits; a crop whose
    area rounding has pushed out of bounds is moved by one row or drawn again.
    """
    law = Counter()
    area = width * height
    for aspect in aspects:
        bounds = [int(np.rint(np.sqrt(fraction * area / aspect))) for fraction in (area_min, 1.0)]
        fitting = [h for h in range(1, height + 1) if np.rint(h * aspect) <= width and h <= bounds[1]]
        heights = [h for h in fitting if h >= bounds[0]] or fitting[-1:]
        for h in heights:
            moved = next(
                (
                    k
                    for k in (h, h + 1 if h * np.rint(h * aspect) < area_min * area else h - 1)
                    if area_min * area <= k * np.rint(k * aspect) <= area
                    and k <= height
                    and np.rint(k * aspect) <= width
                ),
                None,
            )
            if moved is not None:
                law[moved, int(np.rint(moved * aspect))] += 1 / len(heights)
    total = sum(law.values())
    return {shape: weight / total for shape, weight in law.items()}


def distance(law, counts):
    total = sum(counts.values())
    return sum(abs(law.get(shape, 0) - counts[shape] / total) for shape in law.keys() | counts.keys()) / 2


@pytest.mark.parametrize(("width", "height", "area_min"), [(20, 15, 0.05), (9, 24, 0.05), (13, 13, 0.5)])
def test_inception_crop_follows_the_reference_law(width, height, area_min):
    rng = augmentation_rng(1, 0)
    crops = [sample_crop(width, height, rng, area_min) for _ in range(20_000)]
    shapes = Counter((h, w) for _, _, w, h in crops)
    grid = (np.arange(4000) + 0.5) / 4000
    assert distance(crop_law(width, height, area_min, 0.75 + 0.58 * grid), shapes) < 0.03
    logarithmic = 0.75 * (1.33 / 0.75) ** grid
    assert distance(crop_law(width, height, area_min, logarithmic), shapes) > 0.03  # the tolerance tells the two apart

    places = Counter((top, left) for left, top, w, h in crops if (h, w) == (10, 10))
    assert set(places) <= {(top, left) for top in range(max(1, height - 10)) for left in range(max(1, width - 10))}
    for left, top, w, h in crops:
        assert 0 <= top <= height - h
        assert 0 <= left <= width - w
        assert top < height - h or h == height  # the last offset is excluded
        assert left < width - w or w == width


def test_inception_crop_places_are_uniform():
    rng = augmentation_rng(2, 0)
    tops = Counter(top for _, top, _, h in (sample_crop(20, 15, rng, 0.05) for _ in range(30_000)) if h == 10)
    assert sorted(tops) == [0, 1, 2, 3, 4]
    assert max(tops.values()) / min(tops.values()) < 1.25


def test_inception_crop_falls_back_to_the_whole_image():
    assert sample_crop(1000, 1, RNG, 0.05) == (0, 0, 1000, 1)
    assert np.shape(inception_crop(picture(1, 1000), RNG, size=32)) == (32, 32, 3)


@pytest.mark.parametrize("as_image", [False, True])
@pytest.mark.parametrize("shape", [(300, 400, 3), (61, 50, 3), (224, 300), (8, 8), (500, 375, 3), (2, 900, 3)])
def test_inception_crop_is_pillows_to_one_grey_level(shape, as_image):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for position in range(20):
        left, top, w, h = sample_crop(*shape[1::-1], augmentation_rng(0, position), 0.05)
        part = Image.fromarray(np.ascontiguousarray(image[top : top + h, left : left + w]))
        expected = np.asarray(part.resize((32, 32), Image.Resampling.BILINEAR))
        given = Image.fromarray(image) if as_image else image
        got = np.asarray(inception_crop(given, augmentation_rng(0, position), size=32))
        assert got.shape == expected.shape
        assert np.abs(got.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (97, 41), (256, 256), (1, 9), (33, 8)])
def test_resize_small_rounds_half_to_even(height, width):
    out = resize_small(picture(height, width), RNG, size=64)
    resized = out.size if isinstance(out, Image.Image) else out.shape[1::-1]
    assert resized == tuple(round(Fraction(side * 64, min(height, width))) for side in (width, height))


def test_central_crop_starts_at_the_floor():
    image = picture(37, 50)
    np.testing.assert_array_equal(central_crop(image, RNG, size=24), image[6:30, 13:37])
    np.testing.assert_array_equal(np.asarray(central_crop(Image.fromarray(image), RNG, size=24)), image[6:30, 13:37])


def test_random_crop_reaches_every_place():
    image = np.arange(25, dtype=np.uint8).reshape(5, 5)
    corners = {int(random_crop(image, augmentation_rng(0, p), size=3)[0, 0]) for p in range(200)}
    assert corners == {0, 1, 2, 5, 6, 7, 10, 11, 12}


@pytest.mark.parametrize(("fill", "mode"), [("edge", "edge"), ("zero", "constant")])
def test_random_shift_is_padding_and_cropping(fill, mode):
    image = picture(8, 8)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode=mode)
    shifts = {padded[y : y + 8, x : x + 8].tobytes() for y in range(5) for x in range(5)}
    seen = {random_shift(image, augmentation_rng(0, p), pixels=2, fill=fill).tobytes() for p in range(400)}
    assert seen == shifts


def test_flip_mirrors_half_of_the_images():
    image = picture(6, 5)
    flipped = 0
    for position in range(400):
        out = np.asarray(flip_lr(Image.fromarray(image), augmentation_rng(0, position)))
        is_flipped = np.array_equal(out, image[:, ::-1])
        assert is_flipped or np.array_equal(out, image)
        flipped += is_flipped
    assert 150 < flipped < 250


def test_randomness_is_a_function_of_seed_and_position():
    def first(seed, position):
        return augmentation_rng(seed, position).random()

    assert first(5, 9) == first(5, 9)
    assert len({first(seed, position) for seed in (-1, 0, 1, 2**70) for position in range(50)}) == 200


@pytest.mark.parametrize("size", [(500, 375), (64, 640), (224, 224), (31, 30)])
def test_evaluation_agrees_with_the_saved_image_processor(size):
    from vitds.models.image_processor import VitdsImageProcessor

    image = Image.fromarray(picture(size[1], size[0]))
    ours = image
    for transform in build_transforms(eval_default(48), 48, "eval"):
        ours = transform(ours, RNG)
    theirs = VitdsImageProcessor(crop_size=48)(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(np.asarray(ours).transpose(2, 0, 1) / 127.5 - 1, theirs, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            ["inception_corp"],
            r"t\[0\]: 'inception_corp' is not known \(did you mean 'inception_crop'\?\); allowed: .*flip_lr",
        ),
        (["flip_lr", {"resize": {"sise": 3}}], r"t\[1\].resize.sise: unknown parameter \(did you mean 'size'\?\)"),
        ([{"flip_lr": {"p": 0.5}}], "flip_lr.p: unknown parameter; allowed: none"),
        ([{"resize": {"size": "big"}}], "resize.size: expected a whole number of pixels"),
        ([{"resize": {"size": True}}], "resize.size: expected a whole number of pixels"),
        ([{"inception_crop": {"area_min": 8}}], "area_min: expected a fraction"),
        ([{"random_shift": {"fill": "egde"}}], "did you mean 'edge'"),
        ([{"resize": 3}], 'expected "name" or'),
        ([7], 'expected "name" or'),
    ],
)
def test_mistakes_in_the_list_are_named(spec, message):
    with pytest.raises(UserError, match=message):
        build_transforms(spec, 32, "t")
