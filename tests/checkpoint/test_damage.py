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
from checkpoint_ranks import TRAINING_STATE, small_checkpoint
from corruption import DAMAGES as FILE_DAMAGES
from corruption import averaged_checkpoint, files, outcomes, prepared
from safetensors.torch import save_file

import vitds.checkpoint.directory
from vitds.checkpoint import WeightsFile, newest_checkpoint, open_checkpoint, remove_leftovers
from vitds.checkpoint.exchange.weights import open_weights
from vitds.checkpoint.files import parse_json
from vitds.errors import UserError
from vitds.layout import Shard
from vitds.models import ViTConfig
from vitds.models.formats import Outline, our_shapes

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
    monkeypatch.setattr(vitds.checkpoint.directory, "write_manifest", lambda *_: os._exit(9))
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
    in_a_process_that_dies(lambda: small_checkpoint(tmp_path, file_bytes=10**9, min_file_bytes=10**9))
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path) is None
    remove_leftovers(tmp_path)
    assert [found.name for found in tmp_path.iterdir()] == ["step-000000012"]
    assert open_checkpoint(path)
    assert (path / "manifest.json").read_bytes() == before
    small_checkpoint(tmp_path, file_bytes=10**9, min_file_bytes=10**9)
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
    config = ViTConfig(width=8, depth=1, mlp_dim=8, num_heads=2, patch_size=2, image_size=4, num_classes=3)
    stored = {name: torch.randn(shape) for name, shape in our_shapes(Outline.of(config)).items()}
    stored["pos_embed"], stored["head.bias"] = stored["pos_embed"].bfloat16(), stored["head.bias"].half()
    stored["norm.bias"] = torch.arange(8)
    save_file(stored, path)
    weights = WeightsFile(path)
    starts = {"pos_embed": 2, "head.bias": 1, "norm.weight": 0}
    shards = [Shard(name, tuple(stored[name].shape), torch.zeros(2), start) for name, start in starts.items()]
    weights.read_into(shards)
    for shard in shards:
        assert torch.equal(shard.data, stored[shard.name].float().view(-1)[shard.start : shard.start + 2])
    assert weights.read_tensor("pos_embed", 3).dtype == torch.float32
    with pytest.raises(UserError, match=r"'norm\.bias' is torch\.int64 there"):
        weights.read_tensor("norm.bias")


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


@pytest.fixture(scope="module")
def beside_a_good_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("corruption"))


def test_the_matrix_covers_every_kind_of_file(beside_a_good_one: Path) -> None:
    names = files(beside_a_good_one)
    assert len(names) == 13
    assert {"model.ema-00002-of-00002.safetensors", "model.safetensors.index.ema.json", "manifest.json"} <= set(names)


FILES = [
    "manifest.json",
    "training_state.json",
    "config.json",
    "README.md",
    *(f"{kind}-0000{i}-of-00002.safetensors" for kind in ("model", "model.ema", "optimizer") for i in (1, 2)),
    "model.safetensors.index.json",
    "model.safetensors.index.ema.json",
    "optimizer.safetensors.index.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", FILE_DAMAGES)
def test_corruption(beside_a_good_one: Path, damage: str, name: str) -> None:
    """tests/checkpoint/corruption.py prints the counts of this matrix."""
    found = outcomes(beside_a_good_one, name, damage)
    assert set(found) <= {"passed over", "refused"}, found
    assert found.total() == (16 if damage == "bit flipped" else 1)


def with_state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        edit(directory / "training_state.json", change)
        reseal(directory)

    return damage


STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    **{
        f"no {key}": (lambda s, key=key: s.pop(key), f"training_state.json: {key}")  # type: ignore[misc]
        for key in TRAINING_STATE
        if key != "note"
    },
    "position a string": (lambda s: s.update(position="7"), "position: expected a whole number, found '7'"),
    "position a float": (lambda s: s.update(position=7.0), "position: expected a whole number, found 7.0"),
    "position negative": (lambda s: s.update(position=-1), "position: expected at least 0, found -1"),
    "images true": (lambda s: s.update(images_seen=True), "images_seen: expected a whole number, found True"),
    "step absurd": (lambda s: s.update(step=2**70), "step: expected at least 0"),
    "of another step": (lambda s: s.update(step=13), "step: 13, in a checkpoint of step 12"),
    "skipped flat": (lambda s: s.update(skipped=[3, 5]), "skipped[0]: expected a list"),
    "skipped three": (lambda s: s.update(skipped=[[3, 5, 7]]), "skipped[0]: expected [start, end)"),
    "skipped backwards": (lambda s: s.update(skipped=[[5, 3]]), "skipped[0]: expected [start, end)"),
    "losses of words": (lambda s: s.update(losses=[1.0, "nan"]), "losses[1]: expected a number"),
    "a loss too large": (lambda s: s.update(losses=[10**400]), "a number that is too large"),
    "stream without seed": (lambda s: s["stream"].pop("seed"), "stream.seed: missing"),
    "stream a list": (lambda s: s.update(stream=[]), "stream.seed: missing"),
    "batch of nothing": (lambda s: s["stream"].update(global_batch=0), "stream.global_batch: expected at least 1"),
    "frozen a number": (lambda s: s["stream"].update(rates={"head": [1, 2, 0]}), "stream.rates.head: expected [rate"),
    "rates malformed": (lambda s: s["stream"].update(rates={"head": [1, 2]}), "stream.rates.head"),
    "schedule unknown": (
        lambda s: s["schedule"].update(type="cosinus"),
        "schedule.type: 'cosinus' is not known (did you mean 'cosine'?)",
    ),
    "schedule's key unknown": (
        lambda s: s["schedule"]["params"].update(warmupsteps=1),
        "schedule: scheduler.params.warmupsteps",
    ),
    "schedule of no steps": (
        lambda s: s["schedule"].update(total_steps=0),
        "schedule.total_steps: expected at least 1",
    ),
    "optimizer no name": (lambda s: s.update(optimizer={"type": 3}), "optimizer.type: expected a string"),
    "updates negative": (lambda s: s["counters"].update(optimizer={"updates": -3}), "counters.optimizer.updates"),
    "foreign counters": (lambda s: s["counters"].update(optimizer={"state": {}}), "counters.optimizer: group: missing"),
    "loss scale a word": (
        lambda s: s["counters"].update(loss_scale={"cur_scale": "big"}),
        "counters.loss_scale.cur_scale: expected a number",
    ),
    "stage 4": (lambda s: s.update(zero_stage=4), "zero_stage: expected 0 to 3"),
    "newer": (lambda s: s.update(format_version=2), "format_version 2 is newer"),
    "no version": (lambda s: s.pop("format_version"), "no format_version"),
}


@pytest.mark.parametrize("change", STATES)
def test_a_training_state_that_cannot_be_is_refused_by_its_key(tmp_path: Path, change: str) -> None:
    path = small_checkpoint(tmp_path)
    with_state(STATES[change][0])(path)
    with pytest.raises(UserError, match=r"training_state\.json") as refused:
        open_checkpoint(path)
    assert STATES[change][1] in str(refused.value)
    with pytest.raises(UserError, match=r"training_state\.json"):
        newest_checkpoint(tmp_path)


def test_keys_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    path = small_checkpoint(tmp_path)
    with_state(lambda s: s.update(plugin={"x": 1}))(path)
    assert open_checkpoint(path).training_state["plugin"] == {"x": 1}


def test_what_is_not_wanted_is_passed_over_but_a_run_never_begins_afresh_for_it(tmp_path: Path) -> None:
    for step in (12, 24, 36):
        small_checkpoint(tmp_path, step)
    said: list[str] = []

    def later_than(step: int) -> Callable[[dict[str, Any]], str | None]:
        return lambda state: "it learnt from a spike" if state["step"] > step else None

    found = newest_checkpoint(tmp_path, report=said.append, passed_over=later_than(12))
    assert found is not None
    assert found.step == 12
    assert [line.split(": ")[-1] for line in said[:2]] == ["it learnt from a spike"] * 2
    with pytest.raises(UserError, match=r"3 checkpoint\(s\) and none can be used"):
        newest_checkpoint(tmp_path, passed_over=later_than(0))
    flipped(tmp_path / "step-000000012")
    with pytest.raises(UserError, match="step-000000012: .*is not what was saved"):
        newest_checkpoint(tmp_path, passed_over=later_than(12))


def test_weights_to_start_from_are_hashed_where_there_is_a_manifest(tmp_path: Path) -> None:
    path = small_checkpoint(tmp_path, file_bytes=10**9)
    assert open_weights(path).specs
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors: its content is not what was saved"):
        open_weights(path)
    assert open_weights(path, verify="size").specs


def test_an_average_is_read_only_where_it_is_and_is_of_the_same_weights(tmp_path: Path) -> None:
    plain, path = small_checkpoint(tmp_path / "plain"), averaged_checkpoint(tmp_path, 12, offset=0.5)
    checkpoint = open_checkpoint(path)
    assert list(checkpoint.kinds) == ["model", "optimizer", "model.ema"]
    shards = [Shard(n, t.spec.shape, torch.zeros(t.spec.numel)) for n, t in checkpoint.kinds["model"].items()]
    checkpoint.read_into({"model.ema": shards})
    for shard in shards:
        expected = checkpoint.read_tensor(shard.name) + 0.5
        assert torch.equal(shard.data.nan_to_num(), expected.nan_to_num()), shard.name
    for name in ("pos_embed", "logit_scale"):
        weights, average = (WeightsFile(path, kind).read_tensor(name) for kind in ("model", "model.ema"))
        assert torch.equal(average, weights + 0.5)
    with pytest.raises(UserError, match=r"holds no model\.ema"):
        WeightsFile(plain, "model.ema")
    with pytest.raises(UserError, match=r"holds no model\.ema; it has model, optimizer"):
        open_checkpoint(plain).read_into({"model.ema": shards})
    with pytest.raises(UserError, match="nothing here asks for it"):
        checkpoint.read_into({"model.ema": shards[1:]})
    edit(path / "model.safetensors.index.ema.json", lambda index: index["weight_map"].pop("pos_embed"))
    reseal(path)
    with pytest.raises(UserError, match=r"'pos_embed' is not the same in model and in model\.ema"):
        open_checkpoint(path)


def test_a_hugging_face_directory_may_be_of_links(tmp_path: Path) -> None:
    """Its cache keeps the files elsewhere; a checkpoint of ours that does so is refused (`test_corruption`)."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    config = ViTConfig(width=8, depth=1, mlp_dim=8, num_heads=2, patch_size=2, image_size=4, num_classes=0)
    shapes = our_shapes(Outline.of(config))
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "blobs" / "0f")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/0f")
    assert torch.equal(WeightsFile(tmp_path / "snapshot").read_tensor("norm.bias"), torch.ones(8))


def test_a_link_within_the_checkpoint_is_read(tmp_path: Path) -> None:
    path = small_checkpoint(tmp_path)
    (path / DATA).rename(path / "kept")
    (path / DATA).symlink_to("kept")
    assert open_checkpoint(path)
