"""Packing: every byte of the shards is decided by the images and the settings, and a pack that is cut short goes on."""

import errno
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from vitds.cli import main
from vitds.data import SourceSection, build_source
from vitds.data_verbs import packing
from vitds.data_verbs.packing import cut, packed_bytes

IMAGES = 23


@pytest.fixture
def folder(tmp_path):
    """Three classes of 10, 1 and 12 noise images, of several formats."""
    rng = np.random.default_rng(0)
    for name, count in (("ant", 10), ("béé", 1), ("cow", 12)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(count):
            picture = Image.fromarray(rng.integers(0, 256, (5 + i, 9, 3), dtype=np.uint8))
            picture.save(tmp_path / "images" / name / f"im.{i}{('.PNG', '.jpg', '.webp')[i % 3]}")
    return tmp_path / "images"


def pack(folder, to, *more):
    return main(["data", "pack", "--from", str(folder), "--to", str(to), "--images-per-shard", "5", *more])


def contents(directory):
    """What lies in a directory, the indices apart: they hold the moment at which their tar was written."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".safetensors"}


def test_the_images_come_back_as_they_were(folder, tmp_path, capsys):
    assert pack(folder, tmp_path / "kept", "--no-shuffle", "--workers", "1", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["images"], told["classes"], told["shards"], told["written"]) == (IMAGES, 3, 5, 5)
    assert told["path"] == f"{tmp_path}/kept/train-{{000000..000004}}.tar"
    original = build_source(SourceSection("folder", path=str(folder)), "train")
    packed = build_source(SourceSection("tar", path=told["path"]), "train")
    assert packed.class_names == original.class_names == ["ant", "béé", "cow"]
    assert [packed.read(i)[:2] for i in range(IMAGES)] == [original.read(i)[:2] for i in range(IMAGES)]
    with tarfile.open(tmp_path / "kept" / "train-000002.tar") as tar:
        assert tar.getnames()[:3] == ["000000010.png", "000000010.cls", "000000010.json"]
        assert json.load(tar.extractfile("000000010.json")) == {"label": 1, "class": "béé", "path": "béé/im.0.PNG"}
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}
    assert sorted(os.listdir(tmp_path / "kept")) == sorted(
        ["classes.json", "pack.json", *(f"train-00000{i}.tar{end}" for i in range(5) for end in ("", ".index.safetensors"))]
    )  # fmt: skip


def test_shuffled_each_image_comes_once(folder, tmp_path):
    for seed in (0, 1):
        assert pack(folder, tmp_path / str(seed), "--shuffle", str(seed), "--workers", "1") == 0
    original = build_source(SourceSection("folder", path=str(folder)), "train")
    every = [original.read(i)[:2] for i in range(IMAGES)]
    orders = []
    for seed in (0, 1):
        packed = build_source(SourceSection("tar", path=str(tmp_path / str(seed))), "train")
        orders.append([every.index(packed.read(i)[:2]) for i in range(IMAGES)])
        assert sorted(orders[-1]) == list(range(IMAGES))
    assert orders[0] != orders[1] != sorted(orders[1])


def test_processes_change_no_byte(folder, tmp_path):
    for workers in ("1", "3"):
        assert pack(folder, tmp_path / workers, "--workers", workers) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_a_pack_that_is_cut_short_goes_on(folder, tmp_path, capsys, monkeypatch):
    """The disk is full in the third shard: nothing shows in the directory until the same command has written the rest."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert pack(folder, whole, "--workers", "1") == 0
    add = packing._add

    def full(file, name, data):
        if name.startswith("000000012"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(file, name, data)

    monkeypatch.setattr(packing, "_add", full)
    capsys.readouterr()
    assert pack(folder, broken, "--workers", "1") == 1
    assert "No space left on device); finished shards are kept" in capsys.readouterr().err
    assert os.listdir(broken) == [".packing"]
    assert not list((broken / ".packing").glob("*.tmp"))
    first = (broken / ".packing" / "train-000000.tar").stat()
    monkeypatch.undo()
    assert pack(folder, broken, "--workers", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["written"] == 3
    assert contents(broken) == contents(whole)
    assert (broken / "train-000000.tar").stat().st_mtime_ns == first.st_mtime_ns

    assert pack(folder, broken, "--workers", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["written"] == 0
    (broken / "train-000001.tar").unlink()
    assert pack(folder, broken, "--workers", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["written"] == 1
    assert contents(broken) == contents(whole)


def test_a_directory_with_something_else_is_refused(folder, tmp_path, capsys):
    to = tmp_path / "packed"
    assert pack(folder, to, "--workers", "1") == 0
    Image.new("L", (4, 4)).save(folder / "ant" / "new.png")
    for more, message in (
        (("--shuffle", "3"), "shuffle 0 there, 3 now"),
        ((), "images 23 there, 24 now"),
    ):
        assert pack(folder, to, *more) == 2
        assert message in capsys.readouterr().err
    (folder / "ant" / "new.png").unlink()
    (to / "pack.json").unlink()
    assert pack(folder, to) == 2
    assert "and no pack.json" in capsys.readouterr().err
    with packing.alone(to):
        assert pack(folder, to) == 2
    assert "another command is packing there" in capsys.readouterr().err
    assert pack(folder, tmp_path / "new", "--prefix", "a/b") == 2
    assert pack(tmp_path / "nowhere", tmp_path / "new") == 2
    assert "--from: " in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda path: packing.shutil._ntuple_diskusage(10**6, 10**6, 10))
    assert pack(folder, tmp_path / "packed") == 2
    assert "0.000 GB are free there, 5 shards take" in capsys.readouterr().err
    assert not os.listdir(tmp_path / "packed")


def test_a_place_that_cannot_be_packed_to_is_told(folder, tmp_path, capsys):
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / ".packing").write_text("in the way")
    assert pack(folder, tmp_path / "packed") == 1
    assert ".packing: cannot be written (File exists)" in capsys.readouterr().err
    assert pack(folder, folder / "shards") == 2
    assert "lies in --from, where it would be one more class" in capsys.readouterr().err
    assert not (folder / "shards").exists()


def test_excluded_images_are_not_packed(folder, tmp_path):
    (tmp_path / "exclude.txt").write_text("ant/im.3.PNG\ncow/im.0.PNG\n")
    assert pack(folder, tmp_path / "packed", "--exclude", str(tmp_path / "exclude.txt"), "--workers", "1") == 0
    packed = build_source(SourceSection("tar", path=str(tmp_path / "packed")), "train")
    assert len(packed) == IMAGES - 2


def test_shards_have_at_most_so_many_bytes(folder, tmp_path):
    to = tmp_path / "packed"
    arguments = ["--shard-bytes", "20kB", "--no-shuffle", "--workers", "1"]
    assert main(["data", "pack", "--from", str(folder), "--to", str(to), *arguments]) == 0
    sizes = [path.stat().st_size for path in sorted(to.glob("*.tar"))]
    assert max(sizes) <= 20_000 + 1024  # two blocks end a tar
    assert len(sizes) < 8
    packed = build_source(SourceSection("tar", path=str(to)), "train")
    assert len(packed) == IMAGES


def test_cuts():
    assert packed_bytes(np.array([0, 1, 512, 513])).tolist() == [2560, 3072, 3072, 3584]
    assert cut(np.array([4, 4, 4, 20, 4, 4]), 10).tolist() == [0, 2, 3, 4, 6]
    assert cut(np.array([5, 5, 5]), 10).tolist() == [0, 2, 3]
