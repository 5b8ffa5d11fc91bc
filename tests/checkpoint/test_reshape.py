"""Saved on three ranks, loaded on one, two and three; the files are plain safetensors and do not know how many."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_ranks import EXTRA, bits, launch, load_and_save_again, logical, shards, zeroed
from safetensors.torch import load_file

from vitds.checkpoint import Checkpoint, Saver, WeightsFile, newest_checkpoint, open_checkpoint
from vitds.checkpoint.format import EMA, MODEL, OPTIMIZER, read_tensors
from vitds.errors import UserError
from vitds.layout import Shard


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[dict[str, Any]]]]:
    root = tmp_path_factory.mktemp("world")
    return root, {3: launch(3, root), 2: launch(2, root)}


def test_every_world_reads_its_slices_bit_for_bit(world: tuple[Path, dict[int, list[dict[str, Any]]]]) -> None:
    root, found = world
    assert [rank["equal"] for ranks in found.values() for rank in ranks] == [True] * 5
    assert load_and_save_again(root / "first", root / "again-1", 0, 1)


def test_the_tensors_written_do_not_depend_on_the_world(world: tuple[Path, dict[int, list[dict[str, Any]]]]) -> None:
    root, _ = world
    load_and_save_again(root / "first", root / "again-1", 0, 1)
    first, expected = root / "first" / "step-000000012", {}
    for tensors in logical():
        expected |= {name: bits(tensor) for name, tensor in tensors.items()}
    for saved, files in ((first, 3), *((root / f"again-{n}" / "step-000000012", max(2, n)) for n in (1, 2, 3))):
        assert len(list(saved.glob("model-*"))) == len(list(saved.glob("optimizer-*"))) == files
        assert {n: bits(t) for file in saved.glob("*.safetensors") for n, t in load_file(file).items()} == expected
        for name in ("training_state.json", "config.json", "README.md"):
            assert (saved / name).read_bytes() == (first / name).read_bytes()


def test_the_background_writes_what_the_foreground_writes(
    world: tuple[Path, dict[int, list[dict[str, Any]]]],
) -> None:
    here, there = (world[0] / name / "step-000000012" for name in ("first", "synchronous"))
    names = sorted(path.name for path in here.iterdir())
    assert names == sorted(path.name for path in there.iterdir())
    assert all((here / name).read_bytes() == (there / name).read_bytes() for name in names)


def test_stock_safetensors_reads_the_files(world: tuple[Path, dict[int, list[dict[str, Any]]]]) -> None:
    directory = world[0] / "first" / "step-000000012"
    for kind, tensors in zip(("model", "optimizer"), logical(), strict=True):
        index = json.loads((directory / f"{kind}.safetensors.index.json").read_text())
        files = {name: load_file(directory / name) for name in set(index["weight_map"].values())}
        got = {name: files[file][name] for name, file in index["weight_map"].items()}
        assert sum(len(file) for file in files.values()) == len(got)
        assert got.keys() == tensors.keys()
        stored = read_tensors(directory, kind).values()
        assert all(tensor.offset % tensor.spec.dtype.itemsize == 0 for tensor in stored)
        for name, tensor in tensors.items():
            assert got[name].dtype == tensor.dtype
            assert got[name].shape == tensor.shape
            assert bits(got[name]) == bits(tensor), name
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert (directory / "README.md").read_bytes() == EXTRA["README.md"]


def test_a_tensor_with_a_hole_or_held_twice_is_refused_on_all_ranks(
    world: tuple[Path, dict[int, list[dict[str, Any]]]],
) -> None:
    root, found = world
    for absent, elements in enumerate(("[0, 3)", "[3, 6)", "[6, 9)")):
        messages = {rank[f"hole {absent}"] for rank in found[3]}
        assert len(messages) == 1
        assert f"tensor 'cut': no rank holds its elements {elements}" in messages.pop()
    messages = {rank["twice"] for rank in found[3]}
    assert len(messages) == 1
    assert "tensor 'blocks.2.w': ranks 2 and 2 both hold" in messages.pop()
    assert not (root / "hole").exists()


TWICE_NAMED = r"(rank \d+ on \S+: .*){2}"
FAILURES = {
    "blocked": "rank 0 on .*a file: File exists",
    "not json": "rank 0 on .*JSON",
    "not shared": "by rank 1 on .*is not seen by rank 0: the output directory must be shared by all hosts",
    "not mounted": "rank 1 on .*: No such file or directory; is the output directory mounted and shared",
    **{
        f"full disk of rank {rank}, {background}": rf"rank {rank} on .*\.(json|safetensors|md): File too large"
        for rank in range(3)
        for background in (True, False)
    },
}


@pytest.mark.parametrize("cause", FAILURES)
def test_a_rank_that_fails_tells_all_and_leaves_the_rest_as_it_was(
    world: tuple[Path, dict[int, list[dict[str, Any]]]], cause: str
) -> None:
    root, found = world
    messages = {rank[cause].replace(f"{root}/elsewhere", f"{root}/first") for rank in found[3]}
    assert len(messages) == 1
    message = messages.pop()
    assert re.search(FAILURES[cause], message), message
    assert not re.search(TWICE_NAMED, message), message
    assert message.endswith("; earlier ones are untouched")
    assert [path.name for path in (root / "first").iterdir()] == ["step-000000012"]
    assert found[3][1]["left elsewhere"] == []
    checkpoint = newest_checkpoint(root / "first")
    assert checkpoint is not None
    assert checkpoint.step == 12


def test_a_rank_that_cannot_try_the_disk_tells_all(world: tuple[Path, dict[int, list[dict[str, Any]]]]) -> None:
    _, found = world
    for rank, message in enumerate(ranks["no bandwidth"] for ranks in found[3]):
        assert re.search("cannot be written to: rank 1 on .*/a file: File exists", message), (rank, message)
        assert not re.search(TWICE_NAMED, message), message


def test_a_save_that_begins_while_one_is_pending_ends_it_first(
    world: tuple[Path, dict[int, list[dict[str, Any]]]],
) -> None:
    root, found = world
    weights, state = logical()
    for rank in found[3]:
        first, second, nbytes, background, note, shares = rank["two begun"]
        assert (first, second) == ("step-000000001", "step-000000002")
        assert nbytes == sum(path.stat().st_size for path in (root / "two" / first).iterdir()) - (
            (root / "two" / first / "manifest.json").stat().st_size
        )
        assert (background, note) == (True, None)
        whole = sum(tensor.nbytes for tensor in (*weights.values(), *weights.values(), *state.values()))
        assert whole / 3 <= shares[0] < whole / 3 + 140
        assert 380 / 3 <= shares[1] <= 140
        assert rank["bandwidth"][0] > 0
        assert rank["bandwidth"] == [found[3][0]["bandwidth"][0], 2]
    for step, added in ((1, False), (2, True)):
        checkpoint = open_checkpoint(root / "two" / f"step-00000000{step}")
        for kind in (MODEL, EMA):
            for name, tensor in weights.items():
                expected = tensor + 1 if added else tensor
                assert bits(checkpoint.read_tensor(name, kind=kind)) == bits(expected), (name, kind)


def test_a_model_that_fits_one_file_is_model_safetensors_and_transformers_reads_both_forms(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    model = ViTForImageClassification(config)
    weights = [Shard(n, tuple(p.shape), p.detach().view(-1)) for n, p in model.state_dict().items()]
    average = [Shard(s.name, s.shape, s.data + 1) for s in weights]
    for step, limit in ((1, 10**9), (2, 2000)):
        saver = Saver(tmp_path, file_bytes=limit)
        tensors = {MODEL: weights, OPTIMIZER: [], EMA: average}
        saver.begin(step, tensors, {}, {"config.json": config.to_json_string()})
        path = saver.commit().path
        for name in ("model.safetensors", "model.ema.safetensors"):
            assert (path / name).exists() == (step == 1)
        for variant, expected in ((None, weights), ("ema", average)):
            loaded: Any = ViTForImageClassification.from_pretrained(path, output_loading_info=True, variant=variant)
            again, info = loaded
            assert not info["missing_keys"]
            assert not info["unexpected_keys"]
            for shard in expected:
                assert torch.equal(again.state_dict()[shard.name].view(-1), shard.data), shard.name
        assert set(WeightsFile(path).specs) == set(model.state_dict())


def _checkpoint(root: Path) -> Checkpoint:
    return open_checkpoint(root / "first" / "step-000000012")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: Shard("blocks.2.v", s.shape, s.data), "did you mean 'blocks.2.w'"),
        (lambda s: Shard(s.name, (3, 10), s.data), r"has shape \(10, 3\) there and \(3, 10\) here"),
        (lambda s: Shard(s.name, s.shape, s.data.half()), "is torch.float32 there and torch.float16 here"),
        (lambda s: None, "'blocks.2.w' is there, and nothing here asks for it"),
    ],
)
def test_reading_is_strict(world: tuple[Path, Any], change: Any, words: str) -> None:
    weights = zeroed(shards(logical()[0], 0, 1))
    changed = [change(shard) if shard.name == "blocks.2.w" else shard for shard in weights]
    with pytest.raises(UserError, match=words):
        _checkpoint(world[0]).read_into({MODEL: [shard for shard in changed if shard is not None]})
    assert not any(shard.data.count_nonzero() for shard in weights)


def test_parts_of_tensors(world: tuple[Path, Any]) -> None:
    checkpoint, (weights, state) = _checkpoint(world[0]), logical()
    assert torch.equal(checkpoint.read_tensor("pos_embed", 4, 17), weights["pos_embed"].view(-1)[4:21])
    assert checkpoint.read_tensor("logit_scale").item() == weights["logit_scale"].item()
    assert checkpoint.read_tensor("empty").numel() == 0
    assert checkpoint.read_tensor("head.bias.step", kind=OPTIMIZER).item() == 2**53 + 1
    assert torch.equal(
        checkpoint.read_tensor("blocks.2.w.exp_avg", 5, kind=OPTIMIZER), state["blocks.2.w.exp_avg"].view(-1)[5:]
    )
    with pytest.raises(UserError, match="did you mean 'pos_embed'"):
        checkpoint.read_tensor("pos_embd")
