"""What `vitds data dedup` finds of copies that were tampered with, what it takes for copies wrongly, and how fast it is.

    python benchmarks/dedup.py [--originals 300] [--unrelated 10000] [--json]

Pictures are made up: coloured noise with the spectrum of photographs and shapes before it (half of them one object on a
plain ground, a layout that many share), and crops of scikit-learn's two photographs. Handwritten digits, whose layouts
are alike by nature, are the hardest case for what is wrongly found.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

from vitds.data import SourceSection, build_source
from vitds.data_verbs.dedup import DISTANCE, SIMILARITY
from vitds.data_verbs.near import Near
from vitds.data_verbs.phash import EDGE, VIEWS, WIDE_EDGE, grey, hashes, is_flat, similarity, view

DISTANCES, SIMILARITIES = (3, 5, 7), (0.8, 0.85, 0.9, 0.95)
WIDTH, HEIGHT = 400, 300


def picture(rng: np.random.Generator, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    """Noise whose amplitude falls as 1/frequency, in front of it up to six shapes; or one object on a plain ground."""
    width, height = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    spectrum = rng.normal(size=(3, *frequency.shape)) + 1j * rng.normal(size=(3, *frequency.shape))
    field = np.fft.irfft2(spectrum / frequency ** rng.uniform(0.9, 1.3), s=(height, width))
    field = 0.8 * field.mean(0) + 0.2 * field  # colours of photographs go together
    values = 128 + rng.uniform(30, 60) * (field - field.mean()) / field.std()
    plain = rng.random() < 0.5
    if plain:
        values = 235 + 0.02 * values
    image = Image.fromarray(values.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    draw = ImageDraw.Draw(image)
    for _ in range(1 + int(rng.integers(0, 6))):
        middle, half = rng.uniform(0.3, 0.7, 2) if plain else rng.random(2), rng.uniform(0.03, 0.25, 2)
        box = np.concatenate([(middle - half), (middle + half)]) * [width, height, width, height]
        kind = draw.ellipse if rng.random() < 0.6 else draw.rectangle
        kind(box.tolist(), fill=tuple(rng.integers(0, 220, 3).tolist()))
    return image


def photographs(count: int, rng: np.random.Generator) -> list[Image.Image]:
    """Crops of scikit-learn's photographs, from a third to a half of their edges."""
    from sklearn.datasets import load_sample_images

    found = []
    for i in range(count):
        whole = Image.fromarray(load_sample_images().images[i % 2])
        width, height = (int(edge * rng.uniform(0.33, 0.5)) for edge in whole.size)
        left, top = int(rng.integers(0, whole.width - width)), int(rng.integers(0, whole.height - height))
        found.append(whole.crop((left, top, left + width, top + height)))
    return found


def encoded(image: Image.Image, quality: int = 90) -> bytes:
    """As a JPEG file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def cropped(image: Image.Image, share: float) -> Image.Image:
    """Without `share` of each edge, taken from the left and the top."""
    return image.crop((round(image.width * share), round(image.height * share), image.width, image.height))


def stamped(image: Image.Image) -> Image.Image:
    image = image.copy()
    ImageDraw.Draw(image).rectangle((0, image.height * 0.88, image.width * 0.35, image.height), fill=(255, 255, 255))
    return image


TAMPERED: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG quality 30": lambda image: encoded(image, 30),
    "JPEG quality 10": lambda image: encoded(image, 10),
    "half the size": lambda image: encoded(scaled(image, 0.5)),
    "twice the size": lambda image: encoded(scaled(image, 2)),
    "squeezed to a square": lambda image: encoded(image.resize((256, 256))),
    "2 % cropped": lambda image: encoded(cropped(image, 0.02)),
    "5 % cropped": lambda image: encoded(cropped(image, 0.05)),
    "10 % cropped": lambda image: encoded(cropped(image, 0.10)),
    "grey": lambda image: encoded(image.convert("L")),
    "30 % brighter": lambda image: encoded(ImageEnhance.Brightness(image).enhance(1.3)),
    "half the contrast": lambda image: encoded(ImageEnhance.Contrast(image).enhance(0.5)),
    "mirrored": lambda image: encoded(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "a label in a corner": lambda image: encoded(stamped(image)),
}


def recall(originals: list[Image.Image]) -> dict[str, dict[str, float]]:
    """For each way of tampering, the share of copies found at each distance and correlation."""
    views = _views([grey(encoded(image), WIDE_EDGE) for image in originals])
    words = [hashes(small) for small in views]
    table = {}
    for name, tamper in TAMPERED.items():
        copies = np.stack([grey(tamper(image)) for image in originals])
        distance = np.stack([np.bitwise_count(own ^ hashes(copies)) for own in words])
        alike = np.stack([similarity(small, copies) for small in views])
        table[name] = {f"≤ {d}": float((distance <= d).any(0).mean()) for d in DISTANCES}
        table[name] |= {
            f"{d}, {s}": float(((distance <= d) & (alike >= s)).any(0).mean()) for d in DISTANCES for s in SIMILARITIES
        }
    return table


def _views(wide: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Each view of the pictures, and of their mirror images, (N, 32, 32) each."""
    found = []
    for number in range(len(VIEWS)):
        small = np.stack([view(one, number) for one in wide])
        found += [small, small[:, :, ::-1]]
    return found


def wrong(small: np.ndarray, known: np.ndarray) -> dict[str, int]:
    """Pairs of pictures that have nothing to do with each other, found at each distance and correlation."""
    views = np.concatenate(_views(known))
    near = Near(hashes(views), max(DISTANCES))
    words = hashes(small)
    query, word = near.pairs(words)
    alike = np.concatenate(
        [similarity(small[query[i : i + 1000]], views[word[i : i + 1000]]) for i in range(0, len(query), 1000)]
    )
    distance = np.bitwise_count(words[query] ^ near.words[word])
    found = {f"≤ {d}": _pairs(query, word % len(known), distance <= d) for d in DISTANCES}
    return found | {
        f"{d}, {s}": _pairs(query, word % len(known), (distance <= d) & (alike >= s))
        for d in DISTANCES
        for s in SIMILARITIES
    }


def _pairs(query: np.ndarray, known: np.ndarray, found: np.ndarray) -> int:
    """Different pairs of pictures, whatever number of views they were found by."""
    return len(np.unique(np.stack([query[found], known[found]]), axis=1).T)


def speeds(rng: np.random.Generator) -> dict[str, float]:
    """Images hashed in a second of one core, and such seconds to compare a million hashes with 50,000 and their views."""
    files = [encoded(picture(rng, (500, 375))) for _ in range(64)]
    began = time.process_time()
    for _ in range(4):
        small = np.stack([grey(file) for file in files])
        hashes(small)
    hashed = 4 * len(files) / (time.process_time() - began)
    words = rng.integers(0, 1 << 63, 2 * len(VIEWS) * 50_000, dtype=np.uint64)
    queries = rng.integers(0, 1 << 63, 1_000_000, dtype=np.uint64)
    began = time.process_time()
    near = Near(words, DISTANCE)
    built = time.process_time() - began
    for first in range(0, len(queries), 4096):
        near.pairs(queries[first : first + 4096])
    return {"images_per_second": hashed, "table_seconds": built, "compare_seconds": time.process_time() - began - built}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--originals", type=int, default=300)
    parser.add_argument("--unrelated", type=int, default=10_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    originals = [picture(rng) for _ in range(options.originals)] + photographs(options.originals // 10, rng)
    unrelated = np.stack([grey(np.asarray(picture(rng, (128, 96))), WIDE_EDGE) for _ in range(options.unrelated)])
    unrelated = unrelated[~is_flat(unrelated)]
    split = len(unrelated) // 5
    digits = [build_source(SourceSection("digits", split=split), "train") for split in ("train", "eval")]
    written = [
        np.stack([grey(source.read(i)[0], edge) for i in range(len(source))])
        for source, edge in zip(digits, (EDGE, WIDE_EDGE), strict=True)
    ]
    found: dict[str, Any] = {
        "recall": recall(originals), "wrong": wrong(_views(unrelated[split:])[0], unrelated[:split]), "wrong_of_digits": wrong(*written),
        "pairs": (len(unrelated) - split) * split, "pairs_of_digits": len(written[0]) * len(written[1]), **speeds(rng),
    }  # fmt: skip
    if options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    columns = [
        *(f"≤ {d}" for d in DISTANCES),
        *(f"{d}, {SIMILARITY}" for d in DISTANCES),
        *(f"{DISTANCE}, {s}" for s in SIMILARITIES),
    ]
    print("| copy | " + " | ".join(columns) + " |\n|---" * 1 + "|---" * len(columns) + "|")
    for name, row in found["recall"].items():
        print(f"| {name} | " + " | ".join(f"{100 * row[column]:.1f} %" for column in columns) + " |")
    for name in ("wrong", "wrong_of_digits"):
        print(f"| {name} | " + " | ".join(str(found[name][column]) for column in columns) + " |")
    print(
        f"\n{found['pairs']:,} unrelated pairs, {found['pairs_of_digits']:,} of digits; ≤ d: by hash alone; d, s: with correlation ≥ s"
    )
    print(f"{found['images_per_second']:.0f} JPEGs of 500×375 a second on one core; a table of 1,600,000 words (50,000 images) in {found['table_seconds']:.1f} s, "
          f"1,000,000 hashes compared with it in {found['compare_seconds']:.1f} s")  # fmt: skip


if __name__ == "__main__":
    main()
