"""`vitds data index`: what it builds, finds and says, and its exit code."""

import json
import os
import tracemalloc

import pytest

from tests.data.tar.making import image, numbered, write_tar
from vitds.cli import main


@pytest.fixture
def shards(tmp_path):
    for number in range(5):
        write_tar(tmp_path / f"{number}.tar", numbered(10 * number, 10))
    return tmp_path


def index(capsys, *arguments):
    code = main(["data", "index", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("workers", [1, 2])
def test_builds_what_is_missing_and_nothing_else(shards, capsys, workers):
    assert index(capsys, "--path", shards / "{0..1}.tar")[0] == 0
    before = {path: path.stat().st_ino for path in shards.glob("*.safetensors")}
    code, out, _ = index(capsys, "--path", shards, "--workers", workers, "--json")
    found = json.loads(out)
    assert (code, found.pop("seconds") >= 0) == (0, True)
    assert found == {
        "shards": 5, "indexed": 3, "images": 50, "without_label": 0, "first_reasons": {}, "multi_label": False,
        "class_names": 0, "largest_label": 9, "wrong": {},
    }  # fmt: skip
    assert {path: path.stat().st_ino for path in before} == before
    assert len(list(shards.glob("*.safetensors"))) == 5
    code, out, _ = index(capsys, "--path", shards, "--workers", workers)
    assert code == 0
    assert out.startswith("50 images in 5 shards; 0 indexed in")
    assert "largest label 9" in out


def test_class_names_are_counted_and_not_kept_by_shard(tmp_path, capsys):
    members = [
        pair for i in range(1000) for pair in ((f"{i}.png", b"-"), (f"{i}.json", f'{{"label": "n{i:08d}"}}'.encode()))
    ]
    first = write_tar(tmp_path / "000.tar", members)
    assert "1000 class names" in index(capsys, "--path", first)[1]
    for i in range(1, 200):
        for suffix in ("", ".index.safetensors"):
            os.link(f"{first}{suffix}", f"{tmp_path}/{i:03d}.tar{suffix}")
    tracemalloc.start()
    code, out, _ = index(capsys, "--path", tmp_path, "--workers", 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert code == 0
    assert out.startswith("200000 images in 200 shards; 0 indexed in")
    assert "1000 class names" in out
    assert peak < 6_000_000, peak


def test_check_reads_the_shards_again(shards, capsys):
    where = shards / "indices"
    assert index(capsys, "--path", shards, "--index-dir", where, "--check")[0] == 1
    assert not where.exists()
    assert index(capsys, "--path", shards, "--index-dir", where)[0] == 0
    assert index(capsys, "--path", shards, "--index-dir", where, "--check")[0] == 0
    path = next(where.glob("3.tar.*"))
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    code, _, err = index(capsys, "--path", shards, "--index-dir", where, "--check", "--workers", 2)
    assert (code, err) == (
        1,
        f"vitds: {shards}/3.tar: the index is not what is in the tar: remove it and index it anew\n",
    )
    assert path.read_bytes() == whole


def test_shards_that_cannot_be_used_are_all_named_and_the_rest_is_done(shards, capsys):
    for number in (1, 3):
        os.truncate(shards / f"{number}.tar", 3000)
    code, out, err = index(capsys, "--path", shards)
    assert code == 1
    assert "30 images in 5 shards; 3 indexed" in out
    assert [line.split(": at offset")[0] for line in err.splitlines()] == [f"vitds: {shards}/{n}.tar" for n in (1, 3)]


def test_images_without_a_label_are_mentioned(shards, capsys):
    write_tar(shards / "5.tar", [("a.png", image(1)), ("b.png", image(2))])
    code, out, _ = index(capsys, "--path", shards)
    assert code == 0
    assert f"2 images have no label that can be used, as in {shards}/5.tar: no label beside it" in out


def test_mistakes_end_with_exit_code_2(shards, capsys):
    (shards / "file").write_text("")
    for arguments, message in (
        (["--path", shards / "{0..9}.tar"], "vitds: --path: 5 of the 10 shards"),
        (["--path", shards, "--index-dir", shards / "file"], "cannot be written: File exists"),
    ):
        code, _, err = index(capsys, *arguments)
        assert (code, message in err) == (2, True), err
