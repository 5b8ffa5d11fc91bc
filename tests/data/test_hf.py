"""Data sets of the `datasets` library: Arrow and parquet, splits, columns, labels of all kinds, many starts at once."""

import io
import itertools
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

datasets = pytest.importorskip("datasets")
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as parquet  # noqa: E402

from vitds.data import DataSection, SourceSection, TrainLoader, build_source, storage  # noqa: E402
from vitds.data.hf_files import _split_of  # noqa: E402
from vitds.data.images import Unusable, decode  # noqa: E402
from vitds.errors import UserError  # noqa: E402

NAMES = ["ant", "bee", "cow"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place)
    return place


def png(value, mode="L"):
    file = io.BytesIO()
    Image.new(mode, (8, 8), value).save(file, "PNG")
    return file.getvalue()


def table(count, first=0, **columns):
    """`count` grey images, image i of the grey level first + i and the class i modulo 3."""
    columns = {"label": ([i % 3 for i in range(count)], datasets.ClassLabel(names=NAMES))} | columns
    return datasets.Dataset.from_dict(
        {
            "note": ["text"] * count,
            "image": [{"bytes": png(first + i), "path": None} for i in range(count)],
            **{name: values for name, (values, _) in columns.items()},
        },
        features=datasets.Features(
            {"note": datasets.Value("string"), "image": datasets.Image()}
            | {name: feature for name, (_, feature) in columns.items()}
        ),
    )


def saved_to_disk(root):
    datasets.DatasetDict({"train": table(20), "validation": table(5, 100)}).save_to_disk(root)


def as_parquet(root):
    (root / "data").mkdir()
    for i in (1, 0):
        table(20).select(range(12 * i, 12 + 8 * i)).to_parquet(root / "data" / f"train-0000{i}-of-00002.parquet")
    table(5, 100).to_parquet(root / "data" / "validation-00000-of-00001.parquet")
    (root / "README.md").write_text("---\nconfigs: []\n---\n")


def hf(path, role="train", **settings):
    return build_source(SourceSection("hf", path=str(path), **settings), role)


@pytest.mark.parametrize("write", [saved_to_disk, as_parquet])
def test_splits_rows_and_labels(tmp_path, write):
    write(tmp_path)
    train, evaluation = hf(tmp_path), hf(tmp_path, "eval")
    assert (len(train), len(evaluation)) == (20, 5)
    assert train.class_names == evaluation.class_names == NAMES
    for source, split, first in ((train, "train", 0), (evaluation, "validation", 100)):
        for index in range(len(source)):
            data, label, key = source.read(index)
            assert (data, label, key) == (png(first + index), index % 3, f"{split}/{index}")
    wanted = [7, 3, 3, 19, 0]
    assert train.read_many(wanted) == [train.read(index) for index in wanted]
    assert train.read_many(range(9, 9)) == []
    assert pickle.loads(pickle.dumps(train)).read(13) == train.read(13)
    keys = ["train/3", "train/20", "train/03", "train/-1", "validation/3", "3", "train/19"]
    assert train.find(keys) == {"train/3": 3, "train/19": 19}
    assert len(hf(tmp_path, "eval", split="train")) == 20
    with pytest.raises(UserError, match=r"vitds.data.eval.split: 'valid' is not known \(did you mean 'validation'\?\)"):
        hf(tmp_path, "eval", split="valid")


def test_a_data_set_without_splits(tmp_path):
    table(6).save_to_disk(tmp_path / "disk")
    (tmp_path / "parquet").mkdir()
    table(6).to_parquet(tmp_path / "parquet" / "images.parquet")
    for kind in ("disk", "parquet"):
        for role in ("train", "eval"):
            source = hf(tmp_path / kind, role)
            assert (len(source), source.read(5)) == (6, (png(5), 2, "rows/5"))
        with pytest.raises(UserError, match="split: 'train' is not known; the data set is not split, leave it away"):
            hf(tmp_path / kind, split="train")


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("train-00001-of-00002-a1b2c3d4e5f6.parquet", "train"),
        ("data/unlabeled-00000-of-00001.parquet", "unlabeled"),
        ("val/part-00000-of-00010.parquet", "validation"),
        ("imagenet/valid_3.parquet", "validation"),
        ("test/train.parquet", "train"),
        ("training/0001.parquet", "train"),
        ("Test.parquet", "test"),
        ("images/0001.parquet", None),
        ("contest/latest.parquet", None),
    ],
)
def test_names_of_parquet_files_tell_their_split(path, split):
    assert _split_of(path) == split


@pytest.mark.parametrize(
    ("values", "feature", "expected"),
    [
        ([2, 0, 1], datasets.Value("int32"), [2, 0, 1]),
        ([[2], [], [0, 1]], datasets.List(datasets.ClassLabel(names=NAMES)), [[2], [], [0, 1]]),
        ([[2], None, [0, 1]], datasets.List(datasets.Value("int64")), [[2], "no label", [0, 1]]),
        ([[2], [0, None], [7, 7]], datasets.List(datasets.Value("uint8")), [[2], "a list of labels with a gap", [7, 7]]),
        ([[2, 1], [0, 0], [1, 2]], datasets.List(datasets.Value("int8"), length=2), [[2, 1], [0, 0], [1, 2]]),
        ([2, None, -1], datasets.ClassLabel(names=NAMES), [2, "no label", -1]),
    ],
)  # fmt: skip
def test_labels_of_numbers(tmp_path, values, feature, expected):
    table(3, label=(values, feature)).save_to_disk(tmp_path)
    source = hf(tmp_path)
    labels = [source.read(index)[1] for index in range(3)]
    assert [str(label) if isinstance(label, Unusable) else label for label in labels] == expected
    assert source.multi_label == any(isinstance(label, list) for label in expected)
    above = [label for label in expected if not isinstance(label, str) and np.max(label, initial=-1) >= 2]
    assert source.count_labels_from(2) == len(above)


@pytest.mark.parametrize("listed", ["ant\nbee\ncow\n", json.dumps(NAMES)])
def test_labels_of_words_need_the_list_of_classes(tmp_path, listed):
    words = (["cow", "ant", "bees"], datasets.Value("string"))
    lists = ([["cow", "ant"], [], ["bees"]], datasets.List(datasets.Value("string")))
    table(3, label=words, all=lists).save_to_disk(tmp_path / "data")
    (tmp_path / "names").write_text(listed)
    with pytest.raises(UserError, match="classes: missing; the labels in column 'label' are words"):
        hf(tmp_path / "data")
    one = hf(tmp_path / "data", classes=str(tmp_path / "names"))
    many = hf(tmp_path / "data", classes=str(tmp_path / "names"), label_key="all")
    why = "label 'bees' is not one of the 3 classes (did you mean 'bee'?)"
    assert [str(label) if isinstance(label, Unusable) else label for _, label, _ in one.read_many(range(3))] == [
        2,
        0,
        why,
    ]
    assert [str(label) if isinstance(label, Unusable) else label for _, label, _ in many.read_many(range(3))] == [
        [2, 0], [], why,
    ]  # fmt: skip
    assert one.class_names == NAMES
    assert one.count_labels_from(0) == 0  # words are no numbers above anything
    table(3).save_to_disk(tmp_path / "named")
    (tmp_path / "others").write_text("ant\ncow\nbee\n")
    hf(tmp_path / "named", classes=str(tmp_path / "names"))
    with pytest.raises(UserError, match="classes: .*others' is not the list of classes that the data set brings"):
        hf(tmp_path / "named", classes=str(tmp_path / "others"))


def test_images_of_any_mode_and_place(tmp_path, monkeypatch):
    """Bytes are handed on as they are; a path is read; what is neither is a bad image, not the end of the run."""
    (tmp_path / "beside.png").write_bytes(png(7))
    images = [
        {"bytes": png((1, 2, 3, 255), "RGBA"), "path": "a.png"},
        {"bytes": None, "path": "beside.png"},
        {"bytes": None, "path": str(tmp_path / "beside.png")},
        {"bytes": None, "path": None},
        {"bytes": b"no image", "path": None},
        None,
    ]
    parquet.write_table(pa.table({"image": images, "label": [0] * 6}), tmp_path / "x.parquet")
    source = hf(tmp_path, image_key="image")
    stored = [data for data, _, _ in source.read_many(range(6))]
    assert stored == [images[0]["bytes"], png(7), png(7), b"", b"no image", b""]
    assert np.asarray(decode(stored[0]))[0, 0].tolist() == [1, 2, 3]
    monkeypatch.setattr(storage, "RETRY_AFTER_SECONDS", ())
    (tmp_path / "beside.png").unlink()
    with pytest.raises(storage.StorageError, match=r"beside.png: cannot be read"):
        source.read(1)


def test_columns_of_plain_parquet(tmp_path):
    columns = {"jpg": [png(i) for i in range(4)], "cls": [3, 1, 2, 0], "score": [0.5] * 4}
    parquet.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=2)
    with pytest.raises(
        UserError, match="image_key: missing; no column is of the feature Image; columns: jpg, cls, score"
    ):
        hf(tmp_path)
    source = hf(tmp_path, image_key="jpg")
    assert source.read_many([3, 0]) == [(png(3), 0, "rows/3"), (png(0), 3, "rows/0")]
    assert source.class_names == []
    for settings, message in (
        ({"image_key": "jpeg"}, r"image_key: 'jpeg' is not known \(did you mean 'jpg'\?\); allowed: jpg, cls, score"),
        ({"image_key": "cls"}, "image_key: column 'cls' holds int64; expected images as the bytes of files"),
        ({"image_key": "jpg", "label_key": "class"}, r"label_key: 'class' is not known \(did you mean 'cls'"),
        ({"image_key": "jpg", "label_key": "score"}, "label_key: column 'score' holds double; expected classes"),
    ):
        with pytest.raises(UserError, match=message):
            hf(tmp_path, **settings)


def test_data_sets_that_cannot_be_used_are_refused(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("mixed", "damaged", "rowless", "two", "bare"):
        (tmp_path / name).mkdir()
    table(2).to_parquet(tmp_path / "mixed" / "train.parquet")
    table(2).to_parquet(tmp_path / "mixed" / "images.parquet")
    whole = (tmp_path / "mixed" / "train.parquet").read_bytes()
    (tmp_path / "damaged" / "train.parquet").write_bytes(whole[:-40])
    datasets.DatasetDict({"train": table(2).select([])}).save_to_disk(tmp_path / "rowless")
    image = ([{"bytes": png(0), "path": None}], datasets.Image())
    table(1, other=image).save_to_disk(tmp_path / "two")
    table(1).remove_columns("label").save_to_disk(tmp_path / "bare")
    for path, message in (
        (tmp_path / "nowhere", "path: .* is not there"),
        (tmp_path / "file", "path: .* is not a directory"),
        (tmp_path / "empty", "path: .* holds neither parquet files nor what save_to_disk"),
        (tmp_path / "mixed", r"path: .*images.parquet' tells no split, but others beside it do \(train\)"),
        (tmp_path / "damaged", "path: .*damaged' is no data set with rows that can be read: Arrow"),
        (tmp_path / "rowless", "path: .*rowless' is no data set with rows that can be read: "),
        (
            tmp_path / "two",
            "image_key: missing; 2 columns are of the feature Image; columns: note, image, label, other",
        ),
        (tmp_path / "bare", "label_key: missing; no column label, labels, cls; columns: note, image"),
    ):
        with pytest.raises(UserError, match=f"^vitds.data.train.{message}") as raised:
            hf(path)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="path: missing; source 'hf' needs the directory of a data set"):
        build_source(SourceSection("hf"), "train")
    with pytest.raises(
        UserError, match="eval.split: missing; the data set has no split validation or eval or test, it has train"
    ):
        hf(tmp_path / "damaged", "eval")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'^vitds.data.train.source: .* pip install "vitds\[hf\]"'):
        hf(tmp_path / "two")


def test_digest_is_of_the_images_not_of_the_files(tmp_path, cache):
    saved_to_disk(tmp_path / "disk")
    (tmp_path / "parquet").mkdir()
    as_parquet(tmp_path / "parquet")
    disk, again = hf(tmp_path / "disk").digest(), hf(tmp_path / "parquet").digest()
    assert disk == again  # other files, cut in other pieces, and read by another start
    table(20).save_to_disk(tmp_path / "pieces", num_shards=7)
    assert hf(tmp_path / "pieces").digest() == disk
    others = [
        table(20).select([1, 0, *range(2, 20)]),
        table(20).select(range(19)),
        table(20, label=([0] * 20, datasets.ClassLabel(names=NAMES))),
        table(20, label=([i % 3 for i in range(20)], datasets.ClassLabel(names=["x", "y", "z"]))),
        table(20).map(lambda row, i: {"image": {"bytes": png(i, "RGB" if i == 4 else "L"), "path": None}}, with_indices=True),
    ]  # fmt: skip
    digests = {disk}
    for i, data in enumerate(others):
        data.save_to_disk(tmp_path / str(i))
        digests.add(hf(tmp_path / str(i)).digest())
    assert len(digests) == 6


def test_parquet_that_was_replaced_is_read_anew(tmp_path):
    table(4).to_parquet(tmp_path / "train.parquet")
    before = hf(tmp_path)
    table(4, 50).to_parquet(tmp_path / "train.parquet")
    after = hf(tmp_path)
    assert (before.read(2)[0], after.read(2)[0]) == (png(2), png(52))


def test_workers_read_it_as_the_rank_does(tmp_path):
    saved_to_disk(tmp_path)
    section = SourceSection("hf", path=str(tmp_path), transforms=[])
    streams = []
    for workers in (0, 2):
        loader = TrainLoader(
            build_source(section, "train"), DataSection(section, num_workers=workers), image_size=8, num_classes=3, seed=5,
            global_batch=4, micro_batch=4, rank=0, world_size=1,
        )  # fmt: skip
        streams.append([])
        for batch in itertools.islice(loader, 10):
            streams[-1].append((batch.images[:, 0, 0, 0].tolist(), batch.labels.tolist()))
        loader.close()
    assert streams[0] == streams[1]
    greys = [grey for images, _ in streams[0][:5] for grey in images]
    assert sorted(greys) == list(range(20))


START = """
import sys
from vitds.data import SourceSection, build_source
source = build_source(SourceSection("hf", path=sys.argv[1]), "train")
print(len(source), source.read(11)[1:], source.digest())
"""


def test_three_first_starts_at_once(tmp_path, cache):
    (tmp_path / "data").mkdir()
    for i in range(2):
        table(12).to_parquet(tmp_path / "data" / f"train-0000{i}-of-00002.parquet")
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", START, str(tmp_path)], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "HF_DATASETS_CACHE": str(cache), "HF_HOME": str(cache)},
        )
        for _ in range(3)
    ]  # fmt: skip
    said = [start.communicate(timeout=120)[0] for start in starts]
    assert [start.returncode for start in starts] == [0, 0, 0]
    assert said[0] == said[1] == said[2]
    assert said[0].startswith("24 (2, 'train/11') ")
    assert len(list(cache.rglob("*.arrow"))) == 1
