"""Image transforms by name, as the run file lists them.

Each is a pure function of (image, generator): a Pillow image or a uint8 array (H, W) or (H, W, 3) in, one of these
out; what begins by resizing also takes a JPEG that is not decoded yet. The list in the run file holds names or
{"name": {parameters}}; a `size` not given is the model's image size.

Resampling is Pillow's antialiased bilinear, which is what the image processor saved beside a checkpoint does, so that
training, evaluation and use agree; training's crops take torch's, which rounds otherwise here and there, by one grey
level, and needs half the time. (big_vision resizes without antialias and truncates to uint8.)
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image

from vitds.data.images import Box, LazyJpeg
from vitds.errors import UserError, nearest, one_of
from vitds.pictures import middle, shorter_edge_to

Picture = np.ndarray | Image.Image
Transform = Callable[[Any, np.random.Generator], Picture]

TRAIN_DEFAULT: list[Any] = ["inception_crop", "flip_lr"]


def eval_default(image_size: int) -> list[Any]:
    """Shortest edge to 256/224 of the image size, then the centre."""
    return [{"resize_small": {"size": round(image_size * 256 / 224)}}, "central_crop"]


def inception_crop(
    image: Picture | LazyJpeg, rng: np.random.Generator, *, size: int, area_min: float = 0.05
) -> Picture:
    """A random part of the image, at least the fraction `area_min` of its area, resized to size × size."""
    return _resize(image, sample_crop(*_width_height(image), rng, area_min), size, size, _by_torch)


def sample_crop(width: int, height: int, rng: np.random.Generator, area_min: float) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a crop, by the law of TensorFlow's `sample_distorted_bounding_box`.

    As big_vision calls it: the aspect ratio is uniform in [0.75, 1.33) (linear, not logarithmic), then the height is
    a uniform integer among those that keep the area within bounds and the crop within the image (so the area is not
    uniform), the width is round(height·aspect), the offsets are uniform and exclude the last one. After 100 failures,
    the whole image.
    """
    largest = width * height
    smallest = area_min * largest
    for _ in range(100):
        aspect = 0.75 + (1.33 - 0.75) * rng.random()
        tallest = round(math.sqrt(largest / aspect))
        if round(tallest * aspect) > width:
            tallest = int((width + 0.5 - 1e-7) / aspect)
        tallest = min(tallest, height)
        shortest = min(round(math.sqrt(smallest / aspect)), tallest)
        h = shortest + _below(rng, tallest - shortest + 1)
        if h * round(h * aspect) < smallest:  # Rounding alone may push the area out of bounds: one row more or less.
            h += 1
        elif h * round(h * aspect) > largest:
            h -= 1
        w = round(h * aspect)
        if 0 < w <= width and 0 < h <= height and smallest <= w * h <= largest:
            top = _below(rng, height - h) if h < height else 0
            left = _below(rng, width - w) if w < width else 0
            return left, top, w, h
    return 0, 0, width, height


def flip_lr(image: Picture, rng: np.random.Generator) -> Picture:
    """The mirror image, with probability one half."""
    if rng.random() >= 0.5:
        return image
    if isinstance(image, Image.Image):  # several times as fast as numpy, which copies pixel by pixel
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image[:, ::-1]


def resize(image: Picture | LazyJpeg, rng: np.random.Generator, *, size: int) -> Picture:
    """size × size, whatever the aspect ratio was."""
    return _resize(image, (0, 0, *_width_height(image)), size, size)


def resize_small(image: Picture | LazyJpeg, rng: np.random.Generator, *, size: int) -> Picture:
    """The shorter edge to `size`, the longer to round(longer · size / shorter)."""
    width, height = _width_height(image)
    return _resize(image, (0, 0, width, height), *shorter_edge_to(width, height, size))


def central_crop(image: Picture, rng: np.random.Generator, *, size: int) -> Picture:
    """The middle size × size, from row floor((H − size)/2) and column floor((W − size)/2)."""
    return _crop(image, *middle(*_width_height(image), size))


def random_crop(image: Picture, rng: np.random.Generator, *, size: int) -> Picture:
    """A size × size part, all places equally likely."""
    width, height = _width_height(image)
    crop_width, crop_height = min(size, width), min(size, height)
    top = _below(rng, height - crop_height + 1)
    left = _below(rng, width - crop_width + 1)
    return _crop(image, left, top, crop_width, crop_height)


def random_shift(
    image: Picture, rng: np.random.Generator, *, pixels: int | None = None, fill: Literal["edge", "zero"] = "edge"
) -> Picture:
    """Moved by up to `pixels` up, down, left and right, which is padding and cropping back.

    Args:
        pixels: largest shift; an eighth of the shorter edge when not given (4 at 32 px).
        fill: what comes in: "edge" repeats the outermost pixels, "zero" is black.
    """
    array = np.asarray(image)
    height, width = array.shape[:2]
    most = max(1, min(height, width) // 8) if pixels is None else pixels
    down, right = _below(rng, 2 * most + 1) - most, _below(rng, 2 * most + 1) - most
    rows, columns = np.arange(-down, height - down), np.arange(-right, width - right)
    moved = array.take(rows, axis=0, mode="clip").take(columns, axis=1, mode="clip")
    if fill == "zero":
        moved[(rows < 0) | (rows >= height)] = 0
        moved[:, (columns < 0) | (columns >= width)] = 0
    return moved


RESIZING = (inception_crop, resize, resize_small)
"""These say how many pixels they want, and take a `LazyJpeg`."""
TRANSFORMS: dict[str, Callable[..., Picture]] = {
    "inception_crop": inception_crop,
    "flip_lr": flip_lr,
    "resize": resize,
    "resize_small": resize_small,
    "central_crop": central_crop,
    "random_crop": random_crop,
    "random_shift": random_shift,
}


def check_transforms(spec: Sequence[Any], place: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, parameters) of each entry of the run file's list.

    Parameters are whole numbers of pixels, fractions (hint float) or words (hint Literal).

    Raises:
        UserError: an entry of another form, an unknown name or parameter, a value of the wrong type.
    """
    checked = []
    for i, entry in enumerate(spec):
        here = f"{place}[{i}]"
        name, parameters = (entry, {}) if isinstance(entry, str) else _only_item(entry, here)
        if name not in TRANSFORMS:
            raise UserError(one_of(here, name, TRANSFORMS))
        known = {
            parameter.name: parameter
            for parameter in inspect.signature(TRANSFORMS[name], eval_str=True).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY
        }
        for word, value in parameters.items():
            if word not in known:
                listed = ", ".join(known) or "none"
                raise UserError(f"{here}.{name}.{word}: unknown parameter{nearest(word, known)}; allowed: {listed}")
            _check_value(value, known[word].annotation, f"{here}.{name}.{word}")
        checked.append((name, parameters))
    return checked


def build_transforms(spec: Sequence[Any], image_size: int, place: str) -> list[Transform]:
    """The functions for the run file's list, in order; missing sizes become `image_size`."""
    pipeline: list[Transform] = []
    for name, parameters in check_transforms(spec, place):
        function = TRANSFORMS[name]
        if "size" in inspect.signature(function).parameters:
            parameters = {"size": image_size, **parameters}
        pipeline.append(functools.partial(function, **parameters) if parameters else function)
    return pipeline


def _only_item(entry: Any, place: str) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, dict) and len(entry) == 1:
        name, parameters = next(iter(entry.items()))
        if isinstance(parameters, dict):
            return name, parameters
    raise UserError(f'{place}: expected "name" or {{"name": {{parameters}}}}, found {entry!r}')


def _check_value(value: Any, hint: Any, place: str) -> None:
    words = [word for word in get_args(hint) if isinstance(word, str)]
    if words:
        if value not in words:
            raise UserError(one_of(place, value, words))
    elif hint is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise UserError(f"{place}: expected a fraction above 0 and at most 1, found {value!r}")
    elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{place}: expected a whole number of pixels ≥ 1, found {value!r}")


def _below(rng: np.random.Generator, bound: int) -> int:
    """A uniform integer in [0, bound); a third of the cost of rng.integers for one value."""
    return int(rng.random() * bound)


def _width_height(image: Picture | LazyJpeg) -> tuple[int, int]:
    return (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else image.size


def _crop(image: Picture, left: int, top: int, width: int, height: int) -> Picture:
    if (width, height) == _width_height(image):
        return image
    if isinstance(image, Image.Image):
        return image.crop((left, top, left + width, top + height))
    return image[top : top + height, left : left + width]


def _resize(
    image: Picture | LazyJpeg,
    box: Box,
    width: int,
    height: int,
    whole: Callable[[Picture, int, int], Picture] | None = None,
) -> Picture:
    """The part `box` of the image, and nothing of what lies around it, as width × height pixels.

    Args:
        whole: takes the place of Pillow's resampling where the box begins and ends with pixels.
    """
    if isinstance(image, LazyJpeg):
        image, box = image.part(box, (width, height))
    left, top = math.floor(box[0]), math.floor(box[1])
    right, bottom = math.ceil(box[0] + box[2]), math.ceil(box[1] + box[3])
    picture = _crop(image, left, top, right - left, bottom - top)
    if box == (left, top, width, height):
        return picture
    if whole is not None and box == (left, top, right - left, bottom - top):
        return whole(picture, width, height)
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(np.ascontiguousarray(picture))
    x, y = box[0] - left, box[1] - top
    return picture.resize((width, height), Image.Resampling.BILINEAR, (x, y, x + box[2], y + box[3]))


def _by_torch(picture: Picture, width: int, height: int) -> np.ndarray:
    """uint8 (height, width) or (height, width, 3)."""
    stored = np.array(picture)
    pixels = torch.from_numpy(stored.reshape(1, *stored.shape[:2], -1)).permute(0, 3, 1, 2)  # (1, C, H, W)
    resized = torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return resized.permute(0, 2, 3, 1).numpy().reshape(height, width, *stored.shape[2:])
