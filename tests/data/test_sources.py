"""Sources: what each holds, that listings are stable, and that mistakes are told in one line."""

import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from tests.data.tar.making import numbered, write_tar
from vitds import sections
from vitds.data import SOURCES, DataSection, SourceSection, build_source, build_sources, storage
from vitds.data.digits import held_out
from vitds.data.section import OrderSection
from vitds.errors import UserError


@pytest.fixture
def images(tmp_path):
    """Three classes of 2, 3 and 1 images, made in an order that is not the sorted one."""
    for name, files in (("owl", ["b.PNG", "a.jpg"]), ("ant", ["3.jpeg", "10.webp", "2.bmp"]), ("été", ["x.png"])):
        (tmp_path / name).mkdir()
        for i, file in enumerate(files):
            Image.new("RGB", (10, 8 + i), (50 * i, 0, 0)).save(tmp_path / name / file)
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    (tmp_path / "ant" / ".hidden.jpg").write_bytes(b"")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "readme.txt").write_text("no class")
    return tmp_path


def section(name, tmp_path):
    made = {
        "digits": lambda: SourceSection("digits"),
        "synthetic": lambda: SourceSection("synthetic", num_images=100, num_classes=7, image_size=12),
        "folder": lambda: SourceSection("folder", path=str(tmp_path)),
        "tar": lambda: SourceSection("tar", path=str(tar_of_folder(tmp_path))),
        "hf": lambda: SourceSection("hf", path=str(data_set_of_folder(tmp_path))),
    }
    return made[name]()


def tar_of_folder(folder):
    """Two shards of the folder's images, labelled by the names of their classes."""
    files = [path for path in sorted(folder.glob("*/*")) if path.suffix != ".txt" and path.name[0] != "."]
    for number, part in enumerate((files[:2], files[2:])):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for path in part:
                name = f"{path.parent.name}/{path.stem}"
                (folder / "label.txt").write_text(path.parent.name)
                tar.add(path, name + path.suffix)
                tar.add(folder / "label.txt", f"{name}.txt")
    return folder


def data_set_of_folder(folder):
    """The folder's PNGs as Arrow files."""
    datasets = pytest.importorskip("datasets")
    files = sorted(folder.glob("*/*.png"))
    columns = {"image": [str(path) for path in files], "label": [path.parent.name for path in files]}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=sorted(set(columns["label"])))}
    datasets.Dataset.from_dict(columns, datasets.Features(features)).save_to_disk(folder / ".data")
    return folder / ".data"


@pytest.mark.parametrize("name", SOURCES)
def test_a_label_is_the_one_that_is_read(name, images):
    source = build_source(section(name, images), "train")
    for index in (0, len(source) - 1):
        assert source.label(index) == source.read(index)[1]


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_keeps_the_contract(name, images):
    of_it = section(name, images)
    first, second = (build_source(of_it, "train") for _ in range(2))
    copy = pickle.loads(pickle.dumps(first))
    assert len(first) == len(second) == len(copy) > 0
    keys = set()
    for index in range(len(first)):
        image, label, key = first.read(index)
        for other in (second, copy):
            other_image, *others = other.read(index)
            assert others == [label, key]
            np.testing.assert_array_equal(np.frombuffer(other_image, np.uint8), np.frombuffer(image, np.uint8))
        assert isinstance(image, bytes) or (image.dtype == np.uint8 and image.shape[2:] in ((), (3,)))
        assert isinstance(label, int)
        assert 0 <= label < len(first.class_names)
        keys.add(key)
    assert len(keys) == len(first)


def test_digits_are_split_once_and_for_all():
    train, evaluation, _ = build_sources(DataSection(SourceSection("digits"), SourceSection("digits")), 10)
    assert (len(train), len(evaluation)) == (1437, 360)
    keys = [{source.read(i)[2] for i in range(len(source))} for source in (train, evaluation)]
    assert not keys[0] & keys[1]
    assert len(keys[0] | keys[1]) == 1797
    labels = [evaluation.read(i)[1] for i in range(360)]
    assert np.bincount(labels).tolist() == [36] * 10
    assert evaluation.read(0)[2] == "digits/0"
    assert evaluation.read(359)[2] == "digits/1781"
    assert train.images.max() == 255
    assert evaluation.images.min() == 0
    assert len(build_source(SourceSection("digits", split="eval"), "train")) == 360


def test_held_out_is_spread_over_each_class():
    labels = np.repeat([0, 1], [72, 360])
    assert np.flatnonzero(held_out(labels)).tolist() == [*range(0, 72, 2), *range(72, 432, 10)]


def test_folder_lists_classes_and_files_by_name(images):
    source = build_source(SourceSection("folder", path=str(images)), "train")
    assert source.class_names == ["ant", "owl", "été"]
    listed = [source.read(i)[1:] for i in range(len(source))]
    assert listed == [
        (0, "ant/10.webp"), (0, "ant/2.bmp"), (0, "ant/3.jpeg"), (1, "owl/a.jpg"), (1, "owl/b.PNG"), (2, "été/x.png"),
    ]  # fmt: skip
    assert source.read(3)[0] == (images / "owl" / "a.jpg").read_bytes()


def test_a_read_that_fails_for_a_moment_is_repeated(images, monkeypatch):
    source = build_source(SourceSection("folder", path=str(images)), "train")
    path = images / "owl" / "a.jpg"
    data = path.read_bytes()
    path.unlink()
    waits = []

    def come_back_in_the_third_wait(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            path.write_bytes(data)

    monkeypatch.setattr(storage.time, "sleep", come_back_in_the_third_wait)
    assert source.read(3)[0] == data
    assert waits == list(storage.RETRY_AFTER_SECONDS[:3])


def test_a_read_that_keeps_failing_names_the_file(images, monkeypatch):
    source = build_source(SourceSection("folder", path=str(images)), "train")
    (images / "owl" / "a.jpg").unlink()
    monkeypatch.setattr(storage, "RETRY_AFTER_SECONDS", (0.0, 0.0))
    with pytest.raises(storage.StorageError, match=r"owl/a\.jpg: cannot be read \(No such file.*3 attempts"):
        source.read(3)


def test_folders_that_cannot_be_used_are_refused(images, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    bare = tmp_path_factory.mktemp("bare")
    Image.new("L", (4, 4)).save(bare / "a.png")
    hollow = tmp_path_factory.mktemp("hollow")
    for name in ("full", "void", "words"):
        (hollow / name).mkdir()
    Image.new("L", (4, 4)).save(hollow / "full" / "a.png")
    (hollow / "words" / "a.txt").write_text("")
    for path, message in (
        (None, "vitds.data.train.path: missing"),
        (images / "nowhere", "is not there"),
        (images / "readme.txt", "is not a folder"),
        (empty, "holds nothing; expected one folder per class"),
        (bare, "holds 1 images but no class folders"),
        (hollow, "2 of 3 class folders of .* hold no image .*: 'void', 'words'"),
    ):
        with pytest.raises(UserError, match=message):
            build_source(SourceSection("folder", path=path and str(path)), "train")


def test_sections_and_sources_that_do_not_fit_are_refused(images, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for name in ("ant", "bee"):
        (other / name).mkdir()
        Image.new("L", (4, 4)).save(other / name / "a.png")
    folders = DataSection(SourceSection("folder", path=str(images)), SourceSection("folder", path=str(other)))
    with pytest.raises(UserError, match=r"only in train: owl, été; only in eval: bee"):
        build_sources(folders, 10)
    with pytest.raises(
        UserError, match=r"vitds.data.train: 3 classes \(ant, owl, été\), but vitds.model.num_classes is 2"
    ):
        build_sources(folders, 2)
    with pytest.raises(UserError, match=r"path: source 'digits' does not read it; it reads split"):
        build_source(SourceSection("digits", path="x"), "train")
    with pytest.raises(UserError, match="vitds.data.train.split: 'test' is not known"):
        build_source(SourceSection("digits", split="test"), "train")
    for given, message in (
        ({"train": {"source": "digit"}}, "did you mean 'digits'"),
        ({"train": {"source": "digits", "transforms": ["flip"]}}, "transforms.*'flip' is not known"),
        ({"train": {"source": "synthetic", "num_images": 0}}, "num_images: expected a whole number ≥ 1"),
        ({"train": {"source": "digits"}, "prefetch": 0}, "prefetch: expected at least 1"),
        ({"train": {"source": "digits"}, "mix_up": 0.2}, "did you mean 'mixup'"),
    ):
        with pytest.raises(UserError, match=message):
            sections.parse(DataSection, given, "vitds.data")


def windowed(tmp_path, number_of):
    """What the windowed order says of 60 images in tars, of which image i is of class `number_of(i)`."""
    write_tar(tmp_path / "a.tar", numbered(0, 60, number_of))
    source = SourceSection("tar", path=str(tmp_path))
    build_sources(DataSection(train=source, order=OrderSection(kind="windowed")), 10)


@pytest.mark.parametrize(
    ("number_of", "told"),
    [
        (lambda i: i // 6, True),
        (lambda i: i // 30, True),
        (lambda i: i * 37 % 60 // 6, False),
        (lambda i: (i * i + i // 2) % 2, False),
        (lambda i: 3, False),
    ],
)
def test_a_windowed_order_of_images_stored_by_class_is_told(tmp_path, capsys, number_of, told):
    windowed(tmp_path, number_of)
    said = [line for line in capsys.readouterr().err.splitlines() if "have the same label" in line]
    assert len(said) == told
    build_sources(DataSection(train=SourceSection("tar", path=str(tmp_path))), 10)
    assert "same label" not in capsys.readouterr().err


def test_a_source_that_is_none_is_refused(monkeypatch):
    class Mine:
        """As sources were before they had a class of their own."""

        keys = ()

    monkeypatch.setitem(SOURCES, "mine", Mine)
    with pytest.raises(UserError, match="vitds.data.train.source: 'mine' is not derived from vitds.data.Source"):
        build_source(SourceSection("mine"), "train")
