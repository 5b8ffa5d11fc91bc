"""Indices: what is in them, that nobody can see half of one, and that ranks can build them together."""

import json
import multiprocessing
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from tests.data.tar.making import image, numbered, write_tar
from vitds.data import SourceSection
from vitds.data.sources import build_source
from vitds.data.tar import first_use
from vitds.data.tar.first_use import current_head, in_turn, indexed
from vitds.data.tar.index import build_index, index_path, open_index, read_head, write_index
from vitds.errors import UserError


def keep(head):
    """All of it."""
    return head


def test_another_program_can_read_it(tmp_path):
    """With the safetensors package and what the format says, and nothing of ours."""
    members = [
        ("a.png", image(1)),
        ("a.json", b'{"labels": ["ox", "ant"]}'),
        ("b/é.png", image(2)),
        ("c.png", image(3)),
        ("c.txt", b"ox"),
    ]
    shard = write_tar(tmp_path / "s.tar", members)
    write_index(str(shard), index_path(str(shard)))
    whole = shard.read_bytes()
    with safe_open(f"{shard}.index.safetensors", "numpy") as file:
        about = json.loads(file.metadata()["index"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert [whole[o : o + s] for o, s in zip(tensors["offset"], tensors["size"], strict=True)] == [
        image(1),
        image(2),
        image(3),
    ]
    names = np.split(tensors["name"], tensors["name_end"][:-1])
    assert [name.tobytes().decode() for name in names] == ["a", "b/é", "c"]
    assert [labels.tolist() for labels in np.split(tensors["label"], tensors["label_end"][:-1])] == [[1, 0], [-1], [1]]
    digest = about.pop("digest")
    assert about == {
        "format": 1, "tar_bytes": len(whole), "tar_mtime_ns": shard.stat().st_mtime_ns, "label_key": None, "count": 3,
        "unusable": 1, "multi_label": True, "class_names": ["ant", "ox"], "smallest": None, "largest": None,
        "reasons": ["no label beside it"],
    }  # fmt: skip
    index = open_index(index_path(str(shard)))
    assert [(index.key(i), index.labels(i)) for i in range(3)] == [("a", [1, 0]), ("b/é", [-1]), ("c", [1])]
    assert len(digest) == 32


def test_a_key_is_found_whole_and_as_it_is_shown(tmp_path):
    names = ["1", "11", "111", "a/1", "é", "2", b"\xe9".decode(errors="surrogateescape"), "21", "2"]
    members = [(f"{name}.png", image(i)) for i, name in enumerate(names)]
    shard = write_tar(tmp_path / "s.tar", members, encoding="utf-8", errors="surrogateescape")
    write_index(str(shard), index_path(str(shard)))
    index = open_index(index_path(str(shard)))
    shown = ["1", "11", "111", "a/1", "é", "2", "\\xe9", "21"]
    assert [index.key(i) for i in range(9)] == [*shown, "2"]
    assert index.find([*shown, "/1", "112", "1a", "", "\\xe8", "\udce9"]) == {key: i for i, key in enumerate(shown)}


def test_an_index_is_not_taken_apart_for_a_few_keys(tmp_path, monkeypatch):
    """Of 300,000 shards with 10,000 keys each, that would take each rank half an hour at each start."""
    shard = write_tar(tmp_path / "s.tar", numbered(0, 50))
    write_index(str(shard), index_path(str(shard)))
    index = open_index(index_path(str(shard)))
    monkeypatch.setattr(type(index), "key", lambda self, i: pytest.fail("looked at one by one"))
    assert index.find(["000049", "000007", "50"]) == {"000049": 49, "000007": 7}


def test_no_two_writers_write_to_one_file(tmp_path, monkeypatch):
    """Not even two of one host name and process number."""
    shard = write_tar(tmp_path / "s.tar", numbered(0, 3))
    begun = []
    monkeypatch.setattr(
        os, "replace", lambda source, target, was=os.replace: (begun.append(source), was(source, target))
    )
    for _ in range(2):
        write_index(str(shard), index_path(str(shard)))
    assert len(set(begun)) == 2
    assert sorted(os.listdir(tmp_path)) == ["s.tar", "s.tar.index.safetensors"]


def test_the_digest_is_of_the_contents_not_of_the_file(tmp_path):
    one, copy = (write_tar(tmp_path / name / "s.tar", numbered(0, 9)) for name in ("one", "copy"))
    other = write_tar(tmp_path / "other/s.tar", numbered(0, 9, lambda number: number % 8))
    os.utime(copy, ns=(1, 1))
    digests = [write_index(str(path), index_path(str(path))).digest for path in (one, copy, other)]
    assert digests[0] == digests[1] != digests[2]


def test_integers_are_counted_and_wrong_ones_kept_apart(tmp_path):
    labels = ["5", "-1", str(2**31), str(2**31 - 1), "12345678901234567890"]
    shard = write_tar(
        tmp_path / "s.tar",
        [p for i, text in enumerate(labels) for p in ((f"{i}.png", b""), (f"{i}.cls", text.encode()))],
    )
    head = write_index(str(shard), index_path(str(shard)))
    assert (head.count, head.unusable, head.smallest, head.largest) == (5, 3, 5, 2**31 - 1)
    assert head.reasons == [
        "label -1 is not a class", "label 2147483648 is not a class", ".cls holds '12345678901234567890', not an integer",
    ]  # fmt: skip


def test_numbers_and_names_do_not_mix(tmp_path):
    shard = write_tar(tmp_path / "s.tar", [("a.png", b""), ("a.cls", b"1"), ("b.png", b""), ("b.txt", b"ox")])
    with pytest.raises(
        UserError, match="s.tar: labels are numbers for some images and names for others: a has 1, b has 'ox'"
    ):
        build_index(str(shard))


def test_an_index_that_does_not_fit_is_built_anew(tmp_path, capfd):
    shard = str(write_tar(tmp_path / "s.tar", numbered(0, 4)))
    path = index_path(shard)
    assert current_head(shard, None, None) is None
    (head,) = indexed([shard], None, None, "vitds.data.train", keep)
    assert "indexing 1 of 1 shards (`vitds data index`" in capfd.readouterr().err
    assert current_head(shard, None, None) == head
    whole = Path(path).read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    for spoilt in (
        b"",
        whole[:5],
        whole[: 8 + length],
        whole[:-1],
        whole.replace(b'\\"format\\": 1', b'\\"format\\": 9'),
        b"\xff" * 99,
    ):
        assert spoilt != whole
        with open(path, "wb") as file:
            file.write(spoilt)
        assert read_head(path) is None
        assert indexed([shard], None, None, "vitds.data.train", keep) == [head]
        assert Path(path).read_bytes() == whole
    capfd.readouterr()
    os.utime(shard, ns=(5, 5))
    assert current_head(shard, None, None) is None
    (again,) = indexed([shard], None, None, "vitds.data.train", keep)
    assert "indexing 1 of 1 shards, 1 of them because they have changed" in capfd.readouterr().err
    assert again.digest == head.digest
    assert again.tar_mtime_ns == 5


def test_indices_elsewhere_do_not_meet(tmp_path):
    shards = [str(write_tar(tmp_path / name / "s.tar", numbered(0, count))) for name, count in (("a", 2), ("b", 3))]
    where = str(tmp_path / "indices/deep")
    heads = indexed(shards, where, None, "vitds.data.train", keep) + indexed(
        shards[:1], where, "fine/one", "vitds.data.train", keep
    )
    assert [(head.count, head.unusable) for head in heads] == [(2, 0), (3, 0), (2, 2)]
    assert len(os.listdir(where)) == 3
    assert os.listdir(tmp_path / "a") == ["s.tar"]
    assert indexed(shards, where, None, "vitds.data.train", keep) == heads[:2]


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    shard = str(write_tar(tmp_path / "s.tar", numbered(0, 2)))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        UserError,
        match=r"vitds.data.eval.index_dir: the index of .*s.tar cannot be written to .*file.*vitds data index",
    ):
        indexed([shard], str(tmp_path / "file"), None, "vitds.data.eval", keep)
    assert sorted(os.listdir(tmp_path)) == ["file", "s.tar"]


@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_ranks_begin_apart(count, ranks):
    """Each would build all; but first its share, which is nobody else's."""
    built = []
    for rank in range(ranks):
        turn = in_turn(list(range(count)), rank, ranks)
        assert sorted(turn) == list(range(count))
        built += turn[: (rank + 1) * count // ranks - rank * count // ranks]
    assert sorted(built) == list(range(count))


def use_first(folder, rank, ranks, gate, results):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    gate.wait()
    source = build_source(SourceSection("tar", path=str(folder)), "train")
    results.put((rank, len(source), source.digest(), [source.read(i)[2] for i in range(0, len(source), 7)]))


def test_eight_ranks_use_one_folder_for_the_first_time(tmp_path, capfd):
    for number in range(13):
        write_tar(tmp_path / f"{number:02d}.tar", numbered(100 * number, number * 3))
    forked = multiprocessing.get_context("fork")
    gate, results = forked.Barrier(8), forked.Queue()
    processes = [forked.Process(target=use_first, args=(tmp_path, rank, 8, gate, results)) for rank in range(8)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert {process.exitcode for process in processes} == {0}
    assert len({repr(rest) for _, *rest in found}) == 1
    assert found[0][1] == 3 * 78
    left = [name for name in os.listdir(tmp_path) if not name.endswith(".tar")]
    assert sorted(left) == [f"{number:02d}.tar.index.safetensors" for number in range(13)]
    for number in range(13):
        shard = str(tmp_path / f"{number:02d}.tar")
        assert Path(index_path(shard)).read_bytes() == build_index(shard)
    assert capfd.readouterr().err.count("indexing") <= 1


def test_what_another_rank_has_built_is_left_alone(tmp_path, monkeypatch):
    shards = [str(write_tar(tmp_path / f"{number}.tar", numbered(0, 2))) for number in range(4)]
    built = []

    def write(shard, path, label_key):
        built.append(shard)
        head = write_index(shard, path, label_key)
        if len(built) == 1:  # the other rank comes
            for other in shards[2:]:
                write_index(other, index_path(other))
        return head

    monkeypatch.setattr(first_use, "write_index", write)
    assert len(indexed(shards, None, None, "vitds.data.train", keep)) == 4
    assert built == shards[:2]
