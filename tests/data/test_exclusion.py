"""Images that are left out: the others keep their order, and a list that does not fit is refused."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitds.data import SourceSection, build_source
from vitds.data.exclusion import Excluding
from vitds.data.source import Source
from vitds.errors import UserError


class Numbers(Source):
    """Image i is the number i."""

    class_names = ("all",)

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def read(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        return str(index).encode(), index, f"n/{index}"

    def count_labels_from(self, bound):
        return max(0, self.size - bound)


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_what_is_kept_stays_in_order(case):
    size, left_out = case
    source = Excluding(Numbers(size), np.array(sorted(left_out, key=lambda i: i * 7 % 11), dtype=np.int64))
    kept = [f"n/{i}" for i in range(size) if i not in left_out]
    assert len(source) == len(kept)
    assert [source.key(i) for i in range(len(kept))] == kept
    assert [source.read(i)[2] for i in range(len(kept))] == kept
    backwards = list(range(len(kept)))[::-1]
    assert [key for _, _, key in source.read_many(backwards)] == kept[::-1]
    everything = [f"n/{i}" for i in range(size)]
    assert source.find([*everything, "n/x"]) == {key: i for i, key in enumerate(kept)}


def test_the_digest_tells_what_is_left_out():
    whole = Numbers(50)
    digests = {whole.digest(), *(Excluding(whole, np.array(e)).digest() for e in ([3], [4], [3, 4], [49]))}
    assert len(digests) == 5
    assert Excluding(whole, np.array([4, 3, 4])).digest() == Excluding(whole, np.array([3, 4])).digest()
    assert [Excluding(whole, np.array([3, 47, 49])).count_labels_from(bound) for bound in (47, 49, 50)] == [1, 0, 0]
    copy = pickle.loads(pickle.dumps(Excluding(whole, np.array([0]))))
    assert copy.key(0) == "n/1"


@pytest.fixture
def folder(tmp_path):
    for name in ("ant/a.png", "ant/b.png", "bee/a.png", "bee/{c}.png", "bee/ü .png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / "images" / name)
    return tmp_path


def test_a_list_is_plain_or_as_dedup_writes_it(folder):
    listing = folder / "exclude.txt"
    lines = [json.dumps({"key": "bee/{c}.png", "near": "x"}), "", "bee/ü .png", "ant/a.png", "ant/a.png"]
    listing.write_text("\n".join(lines), encoding="utf-8")
    section = SourceSection("folder", path=str(folder / "images"), exclude=str(listing))
    source = build_source(section, "train")
    assert [source.key(i) for i in range(len(source))] == ["ant/b.png", "bee/a.png"]
    assert source.class_names == ["ant", "bee"]
    whole = build_source(SourceSection("folder", path=str(folder / "images")), "train")
    every = [whole.key(i) for i in range(5)]
    assert whole.find([*every, "ant/c.png", "cow/a.png", "ant", "zoo/x", ""]) == {key: i for i, key in enumerate(every)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ant/a.png\nant/gone.png\nbee/z.png\n", "names 2 of 3 images that are not among the 5 .* first 'ant/gone.png'; keys there look like 'ant/a.png'"),
        ('{"near": "ant/a.png"}\n', 'exclude.txt: line 1: expected {"key"'),
        ('ant/a.png\n{"key": "ant/a.png"\n', "exclude.txt: line 2: "),
        ("ant/a.png\nant/b.png\nbee/a.png\nbee/{c}.png\nbee/ü .png\n", "leaves out all 5"),
        (None, "vitds.data.eval.exclude: .*exclude.txt': no such file .did you mean 'excluded.txt'"),
    ],
)  # fmt: skip
def test_lists_that_do_not_fit_are_refused(folder, text, message):
    listing = folder / "exclude.txt"
    (folder / "excluded.txt").touch()
    if text is not None:
        listing.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        build_source(SourceSection("folder", path=str(folder / "images"), exclude=str(listing)), "eval")
