"""Images out of shards: the right bytes under the right index, however they are read, and changes that are noticed."""

import json
import multiprocessing
import os
import pickle
import resource
import tracemalloc

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.tar.making import image, numbered, write_tar
from vitds.data import DataSection, SourceSection, storage
from vitds.data.images import Unusable
from vitds.data.sources import build_source, build_sources
from vitds.data.storage import StorageError
from vitds.data.tar import columns
from vitds.data.tar import shard as shard_module
from vitds.data.tar import source as source_module
from vitds.data.tar.shard import Shard, ShardChanged
from vitds.errors import UserError


def tar(path, role="train", **keys):
    return build_source(SourceSection("tar", path=str(path), **keys), role)


@pytest.fixture
def uneven(tmp_path):
    """40 images in shards of 5, 0, 1, 30, 0 and 4."""
    first = 0
    for number, count in enumerate((5, 0, 1, 30, 0, 4)):
        write_tar(tmp_path / f"{number}.tar", numbered(first, count))
        first += count
    return tmp_path


def test_every_image_under_its_index(uneven):
    source = tar(uneven)
    assert len(source) == 40
    assert (source.multi_label, list(source.class_names)) == (False, [])
    shards = [0] * 5 + [2] + [3] * 30 + [5] * 4
    for i in range(40):
        assert source.read(i) == (image(i), i % 10, f"{shards[i]}.tar/{i:06d}")
        assert source.key(i) == source.read(i)[2]
    for wrong in (40, -1):
        with pytest.raises(IndexError):
            source.read(wrong)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 39), max_size=50), st.integers(0, 4000), st.integers(1, 9000))
def test_many_are_read_as_one_by_one(many, indices, gap, piece):
    source_module.GAP, before = gap, source_module.GAP
    source_module.PIECE, piece_before = piece, source_module.PIECE
    try:
        assert many.read_many(indices) == [many.read(i) for i in indices]
    finally:
        source_module.GAP, source_module.PIECE = before, piece_before


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder, first = tmp_path_factory.mktemp("many"), 0
    for number, count in enumerate((5, 0, 1, 30, 0, 4)):
        write_tar(folder / f"{number}.tar", numbered(first, count))
        first += count
    return tar(folder)


def test_neighbours_are_read_in_one_piece(uneven, monkeypatch):
    source, reads = tar(uneven), []
    monkeypatch.setattr(shard_module, "read_at", lambda *read: (reads.append(read[1:]), storage_read(*read))[1])
    source.read_many([9, 7, 38, 8, 1, 10])
    assert len(reads) == 3
    step = 512 + 512 + 512 + 512  # of an image and its label
    assert reads[1] == (step, 3 * step + 512 + len(image(10)))
    assert sum(length for _, length in reads) < 20_000
    reads.clear()
    monkeypatch.setattr(source_module, "GAP", 512)
    source.read_many([7, 8])
    assert len(reads) == 2


storage_read = shard_module.read_at


def test_shards_of_webdatasets_own_writer(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "train-%06d.tar"), maxcount=6, verbose=0) as writer:
        for i in range(20):
            writer.write(
                {
                    "__key__": f"n{i % 3}/im_{i:04d}",
                    "png": image(i),
                    "cls": i % 3,
                    "json": {"label": 9, "words": [f"w{i}", "all"]},
                }
            )
    source = tar(tmp_path / "train-{000000..000003}.tar")
    assert [source.read(i) for i in range(20)] == [
        (image(i), i % 3, f"train-{i // 6:06d}.tar/n{i % 3}/im_{i:04d}") for i in range(20)
    ]
    named = tar(tmp_path, label_key="words")
    assert named.multi_label
    assert named.class_names == sorted({"all", *(f"w{i}" for i in range(20))})
    assert [named.class_names[label] for label in named.read(7)[1]] == ["w7", "all"]


def test_class_names_over_all_shards(tmp_path):
    write_tar(
        tmp_path / "a/0.tar", [("1.png", image(1)), ("1.txt", b"owl"), ("2.png", image(2)), ("2.txt", b"tench, Tinca")]
    )
    write_tar(tmp_path / "b/0.tar", [("1.png", image(3)), ("1.txt", b"ant"), ("2.png", image(4))])
    pattern = tmp_path / "{a,b}/0.tar"
    source = tar(pattern)
    assert source.class_names == ["ant", "owl", "tench, Tinca"]
    assert [source.read(i)[1:] for i in range(3)] == [(1, "a/0.tar/1"), (2, "a/0.tar/2"), (0, "b/0.tar/1")]
    assert str(source.read(3)[1]) == "no label beside it"
    listed = tmp_path / "classes.txt"
    listed.write_text("tench, Tinca\nowlet\nant\n")
    given_list = tar(pattern, classes=str(listed))
    assert [given_list.read(i)[1] for i in (1, 2)] == [0, 2]
    unknown = given_list.read(0)[1]
    assert isinstance(unknown, Unusable)
    assert "label 'owl' is not one of the 3 classes (did you mean 'owlet'?)" in str(unknown)
    assert given_list.digest() != source.digest()
    listed.write_text("x\ny\n")
    with pytest.raises(
        UserError, match=r"vitds.data.train.classes: none of the labels .* 'ant', 'owl', .* the list has 'x', 'y'"
    ):
        tar(pattern, classes=str(listed))


def test_the_list_of_classes_beside_the_shards_is_used(tmp_path):
    for folder in ("a", "b"):
        write_tar(tmp_path / folder / "0.tar", numbered(0, 4))
    plain = tar(tmp_path / "*/0.tar")
    assert list(plain.class_names) == []
    (tmp_path / "a/classes.json").write_text(json.dumps(names := [f"class {i}" for i in range(10)]))
    source = tar(tmp_path / "*/0.tar")
    assert source.class_names == names
    assert source.digest() == plain.digest()
    (tmp_path / "b/classes.json").write_text(json.dumps(names[::-1]))
    with pytest.raises(UserError, match=r"'.*a/classes.json' and '.*b/classes.json' number the classes differently"):
        tar(tmp_path / "*/0.tar")


def test_one_image_of_several_labels_makes_all_lists(tmp_path):
    write_tar(tmp_path / "0.tar", numbered(0, 3))
    write_tar(
        tmp_path / "1.tar",
        [("a.png", image(9)), ("a.txt", b"3 1"), ("b.png", image(9)), ("b.json", b'{"labels": []}'), ("c.png", b"")],
    )
    source = tar(tmp_path)
    assert source.multi_label
    assert [source.read(i)[1] for i in range(5)] == [[0], [1], [2], [3, 1], []]
    assert isinstance(source.read(5)[1], Unusable)
    assert [source.count_labels_from(bound) for bound in range(5)] == [4, 3, 2, 1, 0]


def test_labels_beyond_the_model_are_refused_before_training(tmp_path):
    write_tar(tmp_path / "0.tar", numbered(0, 30))
    write_tar(tmp_path / "1.tar", numbered(30, 30, lambda number: 20 if number < 33 else 0))
    section = SourceSection("tar", path=str(tmp_path))
    assert build_sources(DataSection(section, section, max_bad_samples=3), 10)
    with pytest.raises(
        UserError, match=r"vitds.data.train: 3 images have labels of 10 or more, but vitds.model.num_classes is 10"
    ):
        build_sources(DataSection(section, max_bad_samples=2), 10)


def test_numbers_in_one_shard_and_names_in_another(tmp_path):
    write_tar(tmp_path / "0.tar", numbered(0, 3))
    write_tar(tmp_path / "1.tar", [("a.png", image(9)), ("a.txt", b"owl")])
    with pytest.raises(UserError, match=r"labels are numbers in .*0.tar \(2\) and names in .*1.tar \('owl'\)"):
        tar(tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "no image in '.*0.tar'; they hold no files at all"),
        ([("a.v1.jpg", b"x"), ("a.cls", b"1")], "0.tar holds 'a.v1.jpg', 'a.cls'; expected KEY.jpg"),
    ],
)
def test_no_image_at_all(tmp_path, members, message):
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(UserError, match=message):
        tar(tmp_path)


def test_paths_that_cannot_be_used(tmp_path):
    for path, message in (
        (None, "vitds.data.train.path: missing; source 'tar' needs"),
        (str(tmp_path / "{0..3}.tar"), "vitds.data.train.path: 4 of the 4 shards"),
        ("https://host/a.tar", "vitds.data.train.path: 'https://host/a.tar' is not a local path"),
    ):
        with pytest.raises(UserError, match=message):
            build_source(SourceSection("tar", path=path), "train")
    (tmp_path / "gone.tar").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="gone.tar: not there"):
        tar(tmp_path)


def test_keys_are_found_in_the_shards_that_they_name(uneven, monkeypatch):
    source = tar(uneven)
    opened = []
    monkeypatch.setattr(
        Shard, "_open_index", lambda self, path, was=Shard._open_index: (opened.append(path), was(self, path))[1]
    )
    assert source.find(["3.tar/000011", "0.tar/000002", "0.tar/nothing", "9.tar/1", "x"]) == {
        "0.tar/000002": 2,
        "3.tar/000011": 11,
    }
    assert [os.path.basename(path)[:5] for path in opened] == ["0.tar", "3.tar"]
    assert source.find(source.key(i) for i in range(40)) == {source.key(i): i for i in range(40)}


def test_open_shards_come_on_top_of_the_files_that_are_allowed(tmp_path, monkeypatch):
    """Of 1024 the connections to 250 ranks leave few."""
    shards = 40
    for i in range(shards):
        write_tar(tmp_path / f"{i}.tar", numbered(i, 1))
    monkeypatch.setattr(storage, "RETRY_AFTER_SECONDS", ())
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    others = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(others) + 30, before[1]))
        source = tar(tmp_path)
        assert [source.read(i)[1] for i in range(shards)] == [
            int(os.path.basename(name).split(".")[0]) % 10 for name in sorted(map(str, tmp_path.glob("*.tar")))
        ]
        assert len(os.listdir("/proc/self/fd")) > 2 * shards
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for descriptor in others:
            os.close(descriptor)


def test_the_class_names_of_shards_are_not_kept_one_by_one(tmp_path):
    """1000 names in each shard, as a shuffled ImageNet has, were 67 kB a shard and rank."""
    label = [f'{{"label": "n{number:08d}"}}'.encode() for number in range(1000)]
    members = [pair for i in range(1000) for pair in ((f"{i}.png", b"-"), (f"{i}.json", label[i]))]
    first = write_tar(tmp_path / "000.tar", members)
    tar(first)
    for i in range(1, 200):
        for suffix in ("", ".index.safetensors"):
            os.link(f"{first}{suffix}", f"{tmp_path}/{i:03d}.tar{suffix}")
    tracemalloc.start()
    source = tar(tmp_path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(source), len(source.class_names)) == (200_000, 1000)
    assert held < 1_000_000 and peak < 6_000_000, (held, peak)


def test_digests(uneven, tmp_path_factory):
    source = tar(uneven)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for path in uneven.glob("*.tar"):
        (elsewhere / f"renamed-{path.name}").write_bytes(path.read_bytes())
    assert tar(elsewhere).digest() == source.digest()
    (elsewhere / "renamed-0.tar").rename(elsewhere / "z.tar")
    assert tar(elsewhere).digest() != source.digest()


def read_all(source, results):
    results.put([source.read(i) for i in range(40)])


def test_forked_and_unpickled_copies_read_the_same(uneven):
    source = tar(uneven)
    expected = [source.read(i) for i in range(40)]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.read(i) for i in range(40)] == expected
    assert copy.digest() == source.digest()
    forked = multiprocessing.get_context("fork")
    results = forked.Queue()
    processes = [forked.Process(target=read_all, args=(source, results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [expected] * 3
    for process in processes:
        process.join()


def test_no_more_than_some_shards_are_open(tmp_path, monkeypatch):
    for number in range(12):
        write_tar(tmp_path / f"{number:02d}.tar", numbered(number, 1))
    monkeypatch.setattr(source_module, "OPEN_SHARDS", 3)
    source = tar(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for i in range(12):
        source.read(i)
    assert len(os.listdir("/proc/self/fd")) <= before + 6


@pytest.mark.parametrize("of", [shard_module, columns])
def test_a_descriptor_that_has_gone_stale_is_opened_anew(uneven, monkeypatch, of):
    source = tar(uneven)
    expected = source.read(7)
    failed = []

    def read(descriptor, *where):
        if not failed:
            failed.append(descriptor)
            os.close(descriptor)
            raise OSError(116, "Stale file handle")
        return storage_read(descriptor, *where)

    monkeypatch.setattr(columns.OpenFile, "__del__", lambda self: None)
    monkeypatch.setattr(of, "read_at", read)
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    assert source.read(7) == expected
    assert failed


def test_an_index_that_goes_away_under_a_run_stops_it(tmp_path, monkeypatch):
    """In memory that is mapped, it would kill the process."""
    shard = write_tar(tmp_path / "s.tar", numbered(0, 2000))
    source = tar(shard)
    source.read(0)
    monkeypatch.setattr(storage, "RETRY_AFTER_SECONDS", (0.0,))
    os.truncate(f"{shard}.index.safetensors", 100)
    for index in (1999, 1999):
        with pytest.raises(
            ShardChanged, match=r"s.tar: the shard has changed since it was indexed: its index is none any"
        ):
            source.read(index)


def test_a_shard_that_cannot_be_read_stops_the_run(uneven, monkeypatch):
    monkeypatch.setattr(storage, "RETRY_AFTER_SECONDS", (0.0,))
    source = tar(uneven)
    (uneven / "3.tar").unlink()
    with pytest.raises(StorageError, match=r"3.tar: cannot be read \(No such file or directory\)"):
        source.read(7)
    source.read(0)


def spoil_data(path):
    """Another header where an image's was, at the same size and time."""
    about = path.stat()
    whole = bytearray(path.read_bytes())
    whole[2048 + 100] ^= 1
    path.write_bytes(whole)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: os.utime(path, ns=(1, 1)), "it has been written to"),
        (lambda path: os.truncate(path, 9000), "9000 bytes in place of"),
        (spoil_data, "000007 is not where it was, at offset 2560"),
    ],
)
def test_a_shard_that_changes_under_a_run_is_noticed(uneven, spoil, message, opened):
    source = tar(uneven)
    if opened:
        source.read(6)
    spoil(uneven / "3.tar")
    with pytest.raises(
        ShardChanged, match=rf"3.tar: the shard has changed since it was indexed: {message}.* start again"
    ):
        source.read(7)
    assert source.read(0)[1] == 0


def test_another_index_under_a_run_is_noticed(uneven):
    """As when another run has indexed a shard that was written anew."""
    source = tar(uneven)
    write_tar(uneven / "3.tar", numbered(6, 30, lambda number: 1))
    tar(uneven)
    with pytest.raises(ShardChanged, match="its index is another now"):
        source.read(7)
    assert tar(uneven).read(7)[1] == 1


def test_little_is_held_of_many_shards(tmp_path):
    for number in range(300):
        write_tar(tmp_path / f"shard-{number:06d}.tar", numbered(0, 40))
    tar(tmp_path)
    tracemalloc.start()
    source = tar(tmp_path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == 12_000
    assert held / 300 < 600
    assert source.read(11_999)[1] == 9
