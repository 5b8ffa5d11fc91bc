"""Whatever has happened to a directory, it is either read as it was saved or refused by the name of the bad file."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_ranks import small_checkpoint
from safetensors.torch import save_file

import vitds.checkpoint.save
from vitds.checkpoint import WeightsFile, newest_checkpoint, open_checkpoint, remove_leftovers
from vitds.checkpoint.files import parse_json
from vitds.errors import UserError
from vitds.layout import Shard

DATA = "optimizer-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def reseal(directory: Path) -> None:
    """A manifest that agrees with the damaged files: the damage was there when they were written."""

    def renew(manifest: dict[str, Any]) -> None:
        for name, record in manifest["files"].items():
            data = (directory / name).read_bytes()
            record.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    edit(directory / "manifest.json", renew)


def truncated(directory: Path) -> None:
    os.truncate(directory / DATA, (directory / DATA).stat().st_size - 1)


def flipped(directory: Path) -> None:
    data = bytearray((directory / DATA).read_bytes())
    data[-1] ^= 1
    (directory / DATA).write_bytes(data)


def bad_header(length: int) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        data = (directory / DATA).read_bytes()
        (directory / DATA).write_bytes(struct.pack("<Q", length) + data[8:])
        reseal(directory)

    return damage


def index_says(file: Any) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        edit(directory / INDEX, lambda index: index["weight_map"].update({"pos_embed": file}))
        reseal(directory)

    return damage


def manifest_with(**change: Any) -> Callable[[Path], None]:
    return lambda directory: edit(directory / "manifest.json", lambda manifest: manifest.update(change))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncated, DATA),
    "bit flip": (flipped, f"{DATA}: its content is not what was saved"),
    "data file missing": (lambda d: (d / DATA).unlink(), f"{DATA}: missing"),
    "manifest missing": (lambda d: (d / "manifest.json").unlink(), "manifest.json: missing"),
    "manifest cut": (lambda d: os.truncate(d / "manifest.json", 99), "manifest.json: not valid JSON"),
    "foreign manifest": (
        lambda d: (d / "manifest.json").write_text('{"name": "app"}'),
        "manifest.json: no format_version",
    ),
    "manifest names a path": (
        manifest_with(files={"../x": {"bytes": 1, "sha256": "0" * 64}}),
        "'../x' is not the name of a file",
    ),
    "of another step": (manifest_with(step=13), "of step 13, in a directory named step-000000012"),
    "newer version": (manifest_with(format_version=2), "manifest.json: format_version 2 is newer"),
    "bad header length": (bad_header(2**40), f"{DATA}: not a safetensors file"),
    "header cut": (bad_header(16), f"{DATA}: header: not valid JSON"),
    "index leaves the directory": (
        index_says("../x.safetensors"),
        f"{INDEX}: weight_map.pos_embed: '../x.safetensors'",
    ),
    "index names a pickle": (index_says("weights.bin"), f"{INDEX}: tensor 'pos_embed' lies in 'weights.bin'"),
    "index names another file": (index_says(DATA), f"{INDEX}: tensor 'pos_embed' is not in {DATA}"),
    "index names no file": (index_says(7), f"{INDEX}: weight_map.pos_embed: 7"),
    "foreign weights": (
        lambda d: (d / "model.safetensors").write_bytes(b"x"),
        "model.safetensors: not in the manifest",
    ),
    "foreign pickle": (lambda d: (d / "pytorch_model.bin").write_bytes(b"x"), "pytorch_model.bin: not in the manifest"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = small_checkpoint(tmp_path)
    change, words = DAMAGES[damage]
    change(path)
    with pytest.raises(UserError) as refused:
        newest_checkpoint(tmp_path)
    assert words in str(refused.value)
    with pytest.raises(UserError):
        open_checkpoint(path)


def test_an_older_whole_checkpoint_is_taken_and_said(tmp_path: Path) -> None:
    small_checkpoint(tmp_path, 12)
    flipped(small_checkpoint(tmp_path, 24))
    truncated(small_checkpoint(tmp_path, 36))
    (tmp_path / "step-000000048.tmp").mkdir()
    (tmp_path / "step-48").mkdir()
    said: list[str] = []
    checkpoint = newest_checkpoint(tmp_path, report=said.append)
    assert checkpoint is not None
    assert checkpoint.step == 12
    assert "step-000000036" in said[0]
    assert "step-000000024" in said[1]
    assert "step-000000012" in said[2]
    by_size = newest_checkpoint(tmp_path, verify="size", report=said.append)
    assert by_size is not None
    assert by_size.step == 24
    os.truncate(tmp_path / "step-000000024" / "README.md", 2)
    shorter = newest_checkpoint(tmp_path, verify="size", report=said.append)
    assert shorter is not None
    assert shorter.step == 12


def test_nothing_there_is_a_fresh_start(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
    assert newest_checkpoint(tmp_path) is None


def in_a_process_that_dies(action: Callable[[], object]) -> None:
    """Run `action` in a fork that must end itself by os._exit(9)."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def test_a_death_between_data_and_manifest_leaves_nothing_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vitds.checkpoint.save, "write_manifest", lambda *_: os._exit(9))
    in_a_process_that_dies(lambda: small_checkpoint(tmp_path))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000012.tmp"]
    assert (tmp_path / "step-000000012.tmp" / DATA).exists()
    assert newest_checkpoint(tmp_path) is None
    small_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000012"]


def test_a_death_while_a_directory_is_replaced_gives_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_checkpoint(tmp_path)
    before = (path / "manifest.json").read_bytes()
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: rename(a, b) if str(b).endswith(".tmp") else os._exit(9))
    in_a_process_that_dies(lambda: small_checkpoint(tmp_path, model_file_bytes=10**9))
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path) is None
    remove_leftovers(tmp_path)
    assert [found.name for found in tmp_path.iterdir()] == ["step-000000012"]
    assert open_checkpoint(path)
    assert (path / "manifest.json").read_bytes() == before
    small_checkpoint(tmp_path, model_file_bytes=10**9)
    assert [found.name for found in tmp_path.iterdir()] == ["step-000000012"]
    assert open_checkpoint(path)
    assert (path / "model.safetensors").exists()


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def entry(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a safetensors file"),
        (header(a=entry([2], 0, 8)) + bytes(7), "its header promises"),
        (header(a=entry([2], 0, 8)) + bytes(9), "its header promises"),
        (header(a=entry([2], 0, 8, "F8_E4M3")) + bytes(8), "dtype: 'F8_E4M3' is not known"),
        (header(a=entry([3], 0, 8)) + bytes(8), "needs 12 bytes"),
        (header(a=entry([-1, -2], 0, 8)) + bytes(8), "impossible shape"),
        (header(a=entry([True, 2], 0, 8)) + bytes(8), "impossible shape"),
        (header(a=entry([2], 0, 8), b=entry([2], 4, 12)) + bytes(12), "begins at byte 4"),
        (header(a=entry([2], 4, 12)) + bytes(12), "begins at byte 4"),
        (header(a=[]), "expected dtype, shape and data_offsets"),
        (struct.pack("<Q", 2**63) + b"{}", "a header of 9,223,372,036,854,775,808 bytes"),
        (struct.pack("<Q", 16) + b'{"a": 1, "a": 1}', "'a' is given twice"),
        (struct.pack("<Q", 40_000) + b"[" * 40_000, "not valid JSON"),
    ],
)
def test_a_file_whose_header_cannot_be_right(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors") as refused:
        WeightsFile(tmp_path)
    assert words in str(refused.value)


@pytest.mark.parametrize("text", [b'{"a": NaN}', b'{"a": 1e999}', b'{"a": 1, "a": 2}', b"[1]", b"\xff{}", b"{"])
def test_json_is_strict(text: bytes) -> None:
    with pytest.raises(UserError, match=r"state\.json"):
        parse_json(text, "state.json")


def test_weights_to_start_from_are_cast_to_fp32(tmp_path: Path) -> None:
    path = tmp_path / "vit.safetensors"
    stored = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.randn(7).half(),
        "c": torch.randn(2, 2),
        "ids": torch.arange(3),
    }
    save_file(stored, path)
    weights = WeightsFile(path)
    shards = [Shard(name, tuple(stored[name].shape), torch.zeros(4), 0 if name == "c" else 2) for name in "abc"]
    weights.read_into(shards)
    for shard in shards:
        assert torch.equal(shard.data, stored[shard.name].float().view(-1)[shard.start : shard.start + 4])
    assert weights.read_tensor("a", 3).dtype == torch.float32
    with pytest.raises(UserError, match=r"'ids' is torch\.int64 there"):
        weights.read_tensor("ids")


def test_what_holds_no_weights_is_refused(tmp_path: Path) -> None:
    path = small_checkpoint(tmp_path / "checkpoints")
    with pytest.raises(UserError, match=f"name one of them, as {path}"):
        WeightsFile(tmp_path)
    assert "pos_embed" in WeightsFile(path).specs
    with pytest.raises(UserError, match="no such file"):
        WeightsFile(tmp_path / "none")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle"):
        WeightsFile(tmp_path / "hf")
