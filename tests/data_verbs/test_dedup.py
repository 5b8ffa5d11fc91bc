"""Near-duplicates: the hash against its definition, the search against all pairs, and what the verb writes."""

import io
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.fft import dctn

from vitds.cli import main
from vitds.data import SourceSection, build_source
from vitds.data_verbs import dedup
from vitds.data_verbs.near import Near
from vitds.data_verbs.phash import grey, hashes, is_flat, similarity


def blurred_noise(rng, width=96, height=72):
    """A picture with large shapes, as photographs have."""
    return Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )


def test_hashes_are_signs_of_low_frequencies():
    small = np.random.default_rng(0).integers(0, 256, (20, 32, 32), dtype=np.uint8)
    for mirrored in (False, True):
        for picture, word in zip(small, hashes(small, mirrored).tolist(), strict=True):
            picture = picture[:, ::-1] if mirrored else picture
            low = dctn(picture.astype(float), type=2)[:8, :8].ravel()[1:]
            assert [bool(word >> bit & 1) for bit in range(63)] == (low > np.median(low)).tolist()
            assert word < 1 << 63


def test_small_versions_are_the_same_however_a_picture_is_stored():
    picture = blurred_noise(np.random.default_rng(0), 640, 480)
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    png, jpeg, rotated = io.BytesIO(), io.BytesIO(), io.BytesIO()
    picture.save(png, "PNG")
    picture.save(jpeg, "JPEG", quality=95)
    turned.save(rotated, "JPEG", quality=95, exif=exif)
    whole = grey(png.getvalue()).astype(int)
    assert whole.shape == (32, 32)
    for other in (grey(np.asarray(picture)), grey(jpeg.getvalue()), grey(rotated.getvalue())):
        assert abs(other - whole).max() <= 8
        assert abs(other - whole).mean() < 0.7


def test_similarity_is_correlation():
    a, b = np.random.default_rng(0).integers(0, 256, (2, 5, 32, 32), dtype=np.uint8)
    expected = [np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(similarity(a, b), expected, atol=1e-12)
    np.testing.assert_allclose(similarity(a, 255 - a), -1)
    assert is_flat(np.stack([np.full((32, 32), 7, np.uint8), a[0]])).tolist() == [True, False]


@given(st.integers(0, 15), st.integers(0, 40), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_every_near_pair_is_found_and_no_other(distance, known, asked, seed):
    """Words close to a few centres, so that all distances occur."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 1 << 63, 3, dtype=np.uint64)

    def words(count):
        flips = np.uint64(1) << rng.integers(0, 63, (count, 9), dtype=np.uint64)
        return rng.choice(centres, count) ^ np.bitwise_xor.reduce(
            flips * rng.integers(0, 2, (count, 9), dtype=np.uint64), axis=1
        )

    mine, theirs = words(known), words(asked)
    query, word = Near(mine, distance).pairs(theirs)
    every = np.bitwise_count(theirs[:, None] ^ mine[None]) <= distance
    assert list(zip(query.tolist(), word.tolist(), strict=True)) == [
        tuple(pair) for pair in np.argwhere(every).tolist()
    ]


def test_many_candidates_are_compared_in_parts(monkeypatch):
    rng = np.random.default_rng(0)
    mine, theirs = (rng.integers(0, 1 << 63, 500, dtype=np.uint64) & np.uint64(0x7FFF0003_00030003) for _ in range(2))
    at_once = Near(mine, 6).pairs(theirs)
    monkeypatch.setattr("vitds.data_verbs.near.PAIRS_AT_ONCE", 100)
    in_parts = Near(mine, 6).pairs(theirs)
    assert len(at_once[0]) > 1000
    np.testing.assert_array_equal(at_once, in_parts)


@pytest.fixture
def images(tmp_path):
    """60 training and 12 evaluation pictures; training images 7, 20, 33 and 46 come from the evaluation, changed."""
    rng = np.random.default_rng(1)
    evaluation = [blurred_noise(rng) for _ in range(12)]
    training = [blurred_noise(rng) for _ in range(60)]
    training[7] = evaluation[3].resize((48, 40))
    training[20] = evaluation[5].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    training[33] = evaluation[3].convert("L")
    training[46] = evaluation[11].crop((7, 5, 96, 72))  # 7 % of each edge
    training[50] = Image.new("RGB", (20, 20), "white")
    evaluation.append(Image.new("RGB", (20, 20), "white"))
    evaluation.append(evaluation[3].copy())  # like training images 7 and 33 too, but less so than number 3
    evaluation[-1].paste((128, 128, 128), (0, 0, 8, 6))
    for role, pictures in (("train", training), ("eval", evaluation)):
        (tmp_path / role / "all").mkdir(parents=True)
        for i, picture in enumerate(pictures):
            picture.save(tmp_path / role / "all" / f"{i:02d}.jpg", quality=60)
    (tmp_path / "train" / "all" / "99.jpg").write_bytes(b"broken")
    return tmp_path


def run(images, *more):
    paths = ["--train-path", str(images / "train"), "--eval-path", str(images / "eval")]
    return main(["data", "dedup", *paths, "--out", str(images / "list.jsonl"), *more])


def test_copies_are_listed_and_can_be_excluded(images, capsys):
    assert run(images, "--workers", "1", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["duplicates"], summary["mirrored"], summary["of_eval_images"]) == (4, 1, 3)
    assert (summary["train"]["images"], summary["train"]["flat"], summary["train"]["broken"]) == (61, 1, 1)
    assert summary["eval"] == {"images": 14, "flat": 1, "broken": 0}
    lines = [json.loads(line) for line in (images / "list.jsonl").read_text().splitlines()]
    assert [(line["key"], line["near"], line["mirrored"]) for line in lines] == [
        ("all/07.jpg", "all/03.jpg", False), ("all/20.jpg", "all/05.jpg", True), ("all/33.jpg", "all/03.jpg", False),
        ("all/46.jpg", "all/11.jpg", False),
    ]  # fmt: skip
    assert all(line["distance"] <= 7 and line["similarity"] >= 0.9 for line in lines)
    section = SourceSection("folder", path=str(images / "train"), exclude=str(images / "list.jsonl"))
    assert len(build_source(section, "train")) == 61 - 4


def test_hashes_are_kept_and_the_list_is_the_same_again(images, monkeypatch, capsys):
    assert run(images, "--workers", "1", "--work", str(images / "in_one_piece")) == 0
    first = (images / "list.jsonl").read_bytes()
    monkeypatch.setattr(dedup, "PIECE", 16)
    assert run(images, "--workers", "3") == 0
    assert (images / "list.jsonl").read_bytes() == first
    assert len(list((images / "list.jsonl.work").iterdir())) == 4
    decoded = []

    def counted(image, edge=32):
        decoded.append(len(image))
        return grey(image, edge)

    monkeypatch.setattr(dedup, "grey", counted)
    assert run(images, "--workers", "1") == 0
    assert (images / "list.jsonl").read_bytes() == first
    assert 14 < len(decoded) < 40  # the evaluation images, and what was near to one
    assert run(images, "--workers", "1", "--similarity", "1") == 0
    assert (images / "list.jsonl").read_bytes() == b""
    (images / "train" / "all" / "00.jpg").unlink()
    decoded.clear()
    assert run(images, "--workers", "1") == 0
    assert len(decoded) == 14 + 60  # other images, other hashes
    assert "4 of 60 training images look like 3 of 14 evaluation images, 1 of them mirrored" in capsys.readouterr().out


def test_names_that_are_not_utf8_are_listed_too(images):
    os.rename(images / "train" / "all" / "07.jpg", os.fsencode(images / "train" / "all") + b"/\xff7.jpg")
    assert run(images, "--workers", "1") == 0
    assert r'"all/\udcff7.jpg"' in (images / "list.jsonl").read_text(encoding="utf-8")
    section = SourceSection("folder", path=str(images / "train"), exclude=str(images / "list.jsonl"))
    assert len(build_source(section, "train")) == 61 - 4
    with open(os.fsencode(images / "train" / "all") + b"/\xff8.jpg", "wb"):
        pass
    stats = [sys.executable, "-m", "vitds.cli", "data", "stats", "--path", images / "train", "--json", "--workers", "1"]
    found = subprocess.run(
        stats, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"}, check=False
    )
    assert [one["key"] for one in json.loads(found.stdout)["broken"]] == ["all/99.jpg", "all/\udcff8.jpg"], found.stderr


def test_what_cannot_be_compared_is_refused(images, capsys):
    same = ["--train-path", str(images / "eval"), "--eval-path", str(images / "eval"), "--out", str(images / "list")]
    assert main(["data", "dedup", *same]) == 2
    assert "are the same" in capsys.readouterr().err
    assert main(["data", "dedup", *same[2:]]) == 2
    assert "either --config, or --train-path and --eval-path" in capsys.readouterr().err
    assert run(images, "--work", str(images / "train" / "all" / "00.jpg" / "x")) == 2
    assert not (images / "list").exists()
    for out, message in (
        (images / "train", "is a directory"),
        (images / "gone" / "list", "is not a directory that can be"),
    ):
        assert run(images, "--out", str(out), "--work", str(images / "work")) == 2
        assert message in capsys.readouterr().err
    assert not (images / "work").exists(), "found before the work is done"


def test_a_full_disk_is_told_and_torn_hashes_are_made_again(images, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        assert run(images, "--workers", "1") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "list.jsonl.work': File too large" in capsys.readouterr().err
    assert not list((images / "list.jsonl.work").iterdir())
    assert run(images, "--workers", "1") == 0
    first = (images / "list.jsonl").read_bytes()
    (kept,) = (images / "list.jsonl.work").iterdir()
    kept.write_bytes(kept.read_bytes()[:50])
    assert run(images, "--workers", "1") == 0
    assert (images / "list.jsonl").read_bytes() == first


def test_a_list_made_before_is_not_in_the_way(images, capsys):
    run_file = images / "run.json"
    data = {role: {"source": "folder", "path": str(images / role)} for role in ("train", "eval")}
    data["train"]["exclude"] = str(images / "list.jsonl")
    run_file.write_text(json.dumps({"train_batch_size": 8, "vitds": {"data": data}}))
    for _ in range(2):
        assert (
            main(["data", "dedup", "--config", str(run_file), "--out", str(images / "list.jsonl"), "--workers", "1"])
            == 0
        )
        assert len((images / "list.jsonl").read_text().splitlines()) == 4
