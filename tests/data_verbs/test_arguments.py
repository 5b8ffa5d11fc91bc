"""Which source reads what lies at a path; numbers that are told."""

import argparse

import pytest
from PIL import Image

from vitds.cli import main
from vitds.data_verbs.arguments import different_numbers, open_path, source_for
from vitds.errors import UserError


@pytest.mark.parametrize(
    ("files", "path", "source"),
    [
        (["ant/a.png"], ".", "folder"),
        (["data/a.png", "{x}/a.png"], ".", "folder"),
        (["a.tar", "classes.json"], ".", "tar"),
        (["a.tar"], "a.tar", "tar"),
        (["a-0.tar", "a-1.tar"], "a-{0..1}.tar", "tar"),
        (["data/train-00000.parquet"], ".", "hf"),
        (["train.parquet"], ".", "hf"),
        (["dataset_dict.json", "train/state.json"], ".", "hf"),
    ],
)
def test_what_lies_there_tells(files, path, source, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert source_for(str(tmp_path / path)) == source


def test_messages_name_the_argument(tmp_path):
    with pytest.raises(UserError, match=r"^--train-path: .*nowhere"):
        open_path(str(tmp_path / "nowhere"), "--train-path")
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"^--path: .*no class folders"):
        open_path(str(tmp_path), "--path")


def test_the_nearest_argument_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["data", "pack", "--from", "x", "--to", "y", "--imagse-per-shard=3"])
    error = capsys.readouterr().err
    assert (
        "vitds data pack: error: unknown argument: --imagse-per-shard=3 (did you mean '--images-per-shard'?)" in error
    )


def test_different_numbers():
    assert different_numbers("5,1,25") == [1, 5, 25]
    for wrong in ("", "1,", "0,1", "1,1", "1,01", "-1", "1.5", "²"):
        with pytest.raises(argparse.ArgumentTypeError, match="different whole numbers ≥ 1"):
            different_numbers(wrong)
