"""Names of classes: both forms of the file, what is wrong with one, words that are no class."""

import json

import pytest

from vitds.data.class_names import ClassNumbers, read_class_names
from vitds.data.images import Unusable
from vitds.errors import UserError


@pytest.mark.parametrize(
    "text", ["tench\ngoldfish \ngreat white shark\n\n", json.dumps(["tench", "goldfish", "great white shark"])]
)
def test_names_are_numbered_in_their_order(tmp_path, text):
    (tmp_path / "classes").write_text(text)
    names = read_class_names(str(tmp_path / "classes"), "vitds.data.train.classes")
    assert names == ["tench", "goldfish", "great white shark"]
    numbers = ClassNumbers(names)
    assert numbers.of("great white shark") == 2
    assert "goldfish" in numbers
    assert "fish" not in numbers
    unknown = numbers.of("goldfinch")
    assert isinstance(unknown, Unusable)
    assert str(unknown) == "label 'goldfinch' is not one of the 3 classes (did you mean 'goldfish'?)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"\xff\xfe", "cannot be read: .*codec"),
        (b'["a",', "cannot be read: Expecting value"),
        (b'{"a": 0}', "is to list names in the order of their numbers, and holds a JSON object"),
        (b"[1, 2]", "is to list names, and holds 1"),
        (b"\n\n", "names no class; expected one name a line"),
        (b"a\n\nb\n", "has no name for class 1"),
        (b"a\nb\na\n", "gives 'a' to class 0 and again to class 2"),
    ],
)
def test_files_that_name_no_classes_are_refused(tmp_path, text, message):
    path = tmp_path / "classes"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(UserError, match=f"^vitds.data.train.classes: '{path}' {message}"):
        read_class_names(str(path), "vitds.data.train.classes")
