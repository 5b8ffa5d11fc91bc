"""Which files of a tar belong together, and what their labels mean."""

import os

import pytest
from webdataset.tariterators import group_by_keys

from tests.data.tar.making import image, numbered, write_tar
from vitds.data.images import Unusable
from vitds.data.tar.labels import label_of, labelled
from vitds.data.tar.members import Members


def read(path, label_key=None):
    """[(key, image's name, label or reason)]"""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        found = list(labelled(Members(descriptor, str(path)), label_key))
    finally:
        os.close(descriptor)
    return [
        (one.key.decode(), one.image.name.decode(), str(one.label) if isinstance(one.label, Unusable) else one.label)
        for one in found
    ]


@pytest.mark.parametrize(
    ("files", "label_key", "expected"),
    [
        ({"cls": b"7\n"}, None, 7),
        ({"cls": b"7", "json": b'{"label": 3}', "txt": b"4"}, None, 7),
        ({"json": b'{"label": 3, "labels": [1]}', "txt": b"4"}, None, 3),
        ({"json": b'{"labels": [1, 2]}'}, None, [1, 2]),
        ({"json": b'{"labels": []}'}, None, []),
        ({"json": b'{"cls": "tabby cat"}'}, None, "tabby cat"),
        ({"json": b'{"labels": ["cat", "mat"]}'}, None, ["cat", "mat"]),
        ({"json": b'{"url": "x"}', "txt": b"4"}, None, 4),
        ({"json": b'{"fine": 5, "label": 3}', "cls": b"7"}, "fine", 5),
        ({"txt": b"4\n"}, None, 4),
        ({"txt": b"4 5,6,\n7"}, None, [4, 5, 6, 7]),
        ({"txt": b"Egyptian cat, Felis\r\n"}, None, "Egyptian cat, Felis"),
        ({"txt": "chêne\nhêtre\n\n".encode()}, None, ["chêne", "hêtre"]),
        ({"cls": b"-1"}, None, -1),
    ],
)
def test_labels(files, label_key, expected):
    assert label_of(files, label_key) == expected


@pytest.mark.parametrize(
    ("files", "label_key", "reason"),
    [
        ({}, None, "no label beside it"),
        ({"json": b'{"url": "x"}'}, None, "no label beside it"),
        ({"cls": b"cat"}, None, ".cls holds 'cat', not an integer"),
        ({"cls": b"\xff"}, None, "its label cannot be read"),
        ({"cls": b"", "json": b'{"label": 3}'}, None, ".cls holds '', not an integer"),
        ({"json": b"{"}, None, "its label cannot be read: Expecting"),
        ({"json": b"[" * 100_000}, None, "nested too deep"),
        ({"json": b"[1]"}, None, ".json holds [1], not an object"),
        ({"json": b'{"label": 3}', "cls": b"7"}, "fine", ".json has no 'fine'"),
        ({"cls": b"7"}, "fine", "no .json with 'fine' beside it"),
        ({"json": b'{"label": null}'}, None, ".json has the label None; expected"),
        ({"json": b'{"label": true}'}, None, ".json has the label True"),
        ({"json": b'{"label": 3.0}'}, None, ".json has the label 3.0"),
        ({"json": b'{"label": ""}'}, None, ".json has the label ''"),
        ({"json": b'{"label": [1, "a"]}'}, None, ".json has the label [1, 'a']"),
        ({"txt": b" \n"}, None, ".txt is empty"),
    ],
)
def test_a_label_that_cannot_be_used_says_why(files, label_key, reason):
    label = label_of(files, label_key)
    assert isinstance(label, Unusable)
    assert reason in str(label)


def test_neighbours_of_one_key_belong_together(tmp_path):
    members = [
        ("train/a.cls", b"1"), ("train/a.JPG", b"x"), ("train/a.seg.png", b"mask"), ("train/b.jpg", b"x"), ("readme", b""),
        ("train/b.meta.json", b"{}"), ("train/b.txt", b"2"), ("c.txt", b"a caption alone"), ("d.png", b"x"),
        ("e.jpg", b"x"), ("e.png", b"x"), ("e.cls", b"3"), ("f.jpg", b"x"), ("f.cls", b"3"), ("f.cls", b"4"), ("g.webp", b"x"),
        ("g.cls", b"5"), ("._h.jpg", b"resource fork"), ("v1.0/i.bmp", b"x"), ("v1.0/i.cls", b"6"), ("g.jpg", b"x"), ("g.cls", b"7"),
    ]  # fmt: skip
    assert read(write_tar(tmp_path / "a.tar", members)) == [
        ("train/a", "train/a.JPG", 1),
        ("train/b", "train/b.jpg", 2),
        ("d", "d.png", "no label beside it"),
        ("e", "e.jpg", "2 images of one key"),
        ("f", "f.jpg", "two .cls of one key"),
        ("g", "g.webp", 5),
        ("v1.0/i", "v1.0/i.bmp", 6),
        ("g", "g.jpg", "an image of this key has been before"),
    ]


def test_keys_are_webdatasets(tmp_path):
    members = [
        *numbered(0, 5),
        ("x/y.z/k.1.2.png", image(1)),
        ("x/y.z/l.PNG", image(2)),
        ("./m.png", image(3)),
        ("noext", b""),
    ]
    expected = [
        sample["__key__"]
        for sample in group_by_keys({"fname": name, "data": data, "__url__": ""} for name, data in members)
        if "png" in sample
    ]
    assert [key for key, _, _ in read(write_tar(tmp_path / "a.tar", members))] == expected
