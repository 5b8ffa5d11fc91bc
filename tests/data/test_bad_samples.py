"""Bad samples: each counted once over ranks and starts, the cap, and the loaders that meet them."""

import itertools
import os

import pytest
from PIL import Image

from tests.test_dist import two_ranks
from vitds.data import BadSample, BadSamples, DataSection, SourceSection, TooManyBad, TrainLoader, build_source
from vitds.errors import UserError
from vitds.json_files import read_rows
from vitds.run_directory import RunDirectory

TORN, WRONG = BadSample("a/1.png", "torn", 17), BadSample("b/2.png", "label 12", 5)


def kept(directory):
    return [{k: v for k, v in row.items() if k != "time"} for row in read_rows(directory.path / "bad_samples.jsonl")]


def test_each_image_is_counted_once_however_often_it_is_met_and_in_whichever_start(tmp_path):
    first, second = BadSamples(9, RunDirectory(tmp_path)), None
    assert not first.news
    first.meet("train", [TORN, WRONG, BadSample("a/1.png", "torn", 40)])
    first.meet("eval", [TORN])
    assert first.news
    assert first.found("train") == [TORN, WRONG]
    assert first.row("train") == {"data/bad_samples": 0}, "the other ranks do not know them yet"
    first.share()
    assert first.row("train") == {"data/bad_samples": 2}
    assert first.row("eval") == {"data/bad_samples_eval": 1}
    directory = RunDirectory(tmp_path)
    lines = kept(directory)
    assert lines == [
        {"role": "train", "key": "b/2.png", "reason": "label 12", "position": 5},
        {"role": "train", "key": "a/1.png", "reason": "torn", "position": 17},
        {"role": "eval", "key": "a/1.png", "reason": "torn", "position": 17},
    ]
    with open(tmp_path / "bad_samples.jsonl", "a") as file:
        file.write('{"role": "train", "ke')  # killed while writing
    second = BadSamples(9, directory)
    second.meet("train", [TORN, BadSample("c/3.png", "no bytes", 50)])
    second.share()
    assert second.row("train") == {"data/bad_samples": 3}
    assert [line["key"] for line in kept(directory)] == ["b/2.png", "a/1.png", "a/1.png", "c/3.png"]


def test_a_name_that_is_not_utf_8_is_written_and_known_again(tmp_path):
    bad = BadSample(os.fsdecode(b"a/caf\xe9.png"), "torn", 17)
    for _ in range(2):
        start = BadSamples(9, RunDirectory(tmp_path))
        start.meet("train", [bad])
        start.share()
        assert start.row("train") == {"data/bad_samples": 1}
    assert [line["key"] for line in kept(RunDirectory(tmp_path))] == [bad.key]


def test_more_than_the_cap_end_this_start_and_the_next_one(tmp_path):
    directory = RunDirectory(tmp_path)
    bad = BadSamples(1, directory)
    bad.meet("train", [TORN])
    bad.meet("eval", [WRONG])  # counted apart
    bad.share()
    bad.meet("train", [WRONG])
    message = (
        r"^vitds\.data\.train: 2 images cannot be used \(vitds\.data\.max_bad_samples is 1\): a/1\.png \(torn\); "
        r"b/2\.png \(label 12\)\. bad_samples\.jsonl .* --set vitds\.data\.max_bad_samples=…[^\n]*$"
    )
    with pytest.raises(TooManyBad, match=message) as raised:
        bad.share()
    assert raised.value.agreed
    assert len(kept(directory)) == 3
    with pytest.raises(TooManyBad, match=message):
        BadSamples(1, directory)
    assert BadSamples(2, directory).row("train") == {"data/bad_samples": 2}


def test_a_line_that_nobody_wrote_is_refused(tmp_path):
    (tmp_path / "bad_samples.jsonl").write_text('{"role": "train", "name": "a/1.png"}\n')
    with pytest.raises(UserError, match=r"bad_samples\.jsonl .* a line without 'key': .*a/1\.png"):
        BadSamples(1, RunDirectory(tmp_path))


def test_the_console_names_the_first_few(tmp_path, capsys):
    bad = BadSamples(100)
    for number in range(12):
        bad.meet("train", [BadSample(f"a/{number}.png", "torn", number)])
        if number % 3 == 2:
            bad.share()
    said = capsys.readouterr().err.splitlines()
    assert said[:5] == [f"vitds: bad sample of vitds.data.train: a/{number}.png: torn" for number in range(5)]
    assert len(said) == 6 and "bad_samples.jsonl" in said[5]


TWO_RANKS = """
from tests.test_dist import two_ranks
from vitds.data import BadSample, BadSamples, TooManyBad
from vitds.run_directory import RunDirectory
with RunDirectory(root) as directory:
    bad = BadSamples(3, directory)
    mine = [[BadSample("a", "torn", 30)], [BadSample("b", "torn", 9), BadSample("a", "torn", 4)]][rank]
    bad.meet("train", mine)
    bad.share()
    found["shared"] = [[one.key, one.position] for one in bad.found("train")]
    bad.meet("train", [BadSample("cd"[rank], "torn", 50)])
    try:
        bad.share()
    except TooManyBad as error:
        found["refused"] = str(error)
leave()
"""


def test_ranks_count_together(tmp_path):
    """Three each would be allowed; four in all are not, and one that both have met is one."""
    (ours, theirs), said = two_ranks(tmp_path, TWO_RANKS)
    assert ours == theirs
    assert ours["shared"] == [["a", 4], ["b", 9]]
    assert ours["refused"].startswith("vitds.data.train: 4 images cannot be used (vitds.data.max_bad_samples is 3): a ")
    assert [row["key"] for row in read_rows(tmp_path / "bad_samples.jsonl")] == ["a", "b", "c", "d"]
    assert [text.count("vitds: bad sample") for text in said] == [4, 0]


@pytest.fixture
def damaged(tmp_path):
    """Twelve images of one class of which 3, 4 and 9 by index cannot be decoded."""
    for index in range(12):
        path = tmp_path / "images" / "a" / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * index).save(path)
        if index in (3, 4, 9):
            path.write_bytes(path.read_bytes()[:40])
    return SourceSection("folder", path=str(tmp_path / "images"), transforms=[])


def loader(section, bad):
    settings = {"image_size": 8, "num_classes": 1, "seed": 5, "global_batch": 4, "micro_batch": 4, "rank": 0}
    return TrainLoader(build_source(section.train, "train"), section, world_size=1, bad=bad, **settings)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_tells_what_it_meets_and_the_edge_refuses_it(damaged, tmp_path, workers):
    directory = RunDirectory(tmp_path)
    bad = BadSamples(2, directory)
    stream = loader(DataSection(damaged, num_workers=workers, max_bad_samples=2), bad)
    list(itertools.islice(stream, 3))
    stream.close()
    assert {sample.key for sample in stream.bad_samples} == {"a/03.png", "a/04.png", "a/09.png"}
    with pytest.raises(TooManyBad, match="3 images cannot be used"):
        bad.share()
    assert len(kept(directory)) == 3


def test_a_rank_that_finds_nothing_to_use_leaves_word_before_it_ends_alone(damaged, tmp_path):
    directory = RunDirectory(tmp_path)
    stream = loader(DataSection(damaged, max_bad_samples=1), BadSamples(1, directory))
    with pytest.raises(UserError, match=r"2 images cannot be used .*a/03\.png .*a/04\.png") as raised:
        list(itertools.islice(stream, 3))
    assert not raised.value.agreed, "other ranks do not know it"
    assert {"a/03.png", "a/04.png"} <= {line["key"] for line in kept(directory)}
