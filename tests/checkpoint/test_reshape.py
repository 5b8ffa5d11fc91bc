"""Saved on three ranks, loaded on one, two and three; the files are plain safetensors and do not know how many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_ranks import EXTRA, bits, launch, load_and_save_again, logical, shards, zeroed
from safetensors.torch import load_file

from vitds.checkpoint import Checkpoint, WeightsFile, newest_checkpoint, open_checkpoint, save_checkpoint
from vitds.checkpoint.format import assign_files, read_tensors
from vitds.checkpoint.tensorfile import TensorSpec
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


def test_what_is_written_does_not_depend_on_the_world(world: tuple[Path, dict[int, list[dict[str, Any]]]]) -> None:
    root, _ = world
    load_and_save_again(root / "first", root / "again-1", 0, 1)
    first = root / "first" / "step-000000012"
    names = sorted(path.name for path in first.iterdir())
    assert sum(name.startswith("model-0") for name in names) == 2
    assert "optimizer-00002-of-00002.safetensors" in names
    for again in (root / f"again-{n}" / "step-000000012" for n in (1, 2, 3)):
        assert sorted(path.name for path in again.iterdir()) == names
        assert all((again / name).read_bytes() == (first / name).read_bytes() for name in names)


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


@pytest.mark.parametrize(
    ("cause", "words"), [("full disk", "File too large"), ("blocked", "exists"), ("not json", "JSON")]
)
def test_a_writer_that_fails_tells_all_ranks_and_leaves_the_rest_as_it_was(
    world: tuple[Path, dict[int, list[dict[str, Any]]]], cause: str, words: str
) -> None:
    root, found = world
    messages = {rank[cause] for rank in found[3]}
    assert len(messages) == 1
    assert words in messages.pop()
    assert [path.name for path in (root / "first").iterdir()] == ["step-000000012"]
    checkpoint = newest_checkpoint(root / "first")
    assert checkpoint is not None
    assert checkpoint.step == 12


def test_a_model_that_fits_one_file_is_model_safetensors_and_transformers_reads_both_forms(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    model = ViTForImageClassification(config)
    weights = [Shard(n, tuple(p.shape), p.detach().view(-1)) for n, p in model.state_dict().items()]
    for step, limit in ((1, 10**9), (2, 2000)):
        path = save_checkpoint(
            tmp_path, step, weights, [], {}, {"config.json": config.to_json_string()}, model_file_bytes=limit
        )
        assert (path / "model.safetensors").exists() == (step == 1)
        loaded: Any = ViTForImageClassification.from_pretrained(path, output_loading_info=True)
        again, info = loaded
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
        assert set(WeightsFile(path).specs) == set(model.state_dict())


def test_tensors_go_to_files_in_the_order_a_person_counts() -> None:
    specs = [
        TensorSpec(name, (size,), torch.float32) for name, size in (("b.10", 2), ("b.9", 2), ("a.1", 9), ("b.1", 2))
    ]
    files = assign_files("model", specs, 16)
    assert [[spec.name for spec in file] for file in files.values()] == [["a.1"], ["b.1", "b.9"], ["b.10"]]
    assert list(files) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert assign_files("model", specs[::-1], 16) == files
    assert list(assign_files("model", specs, 60)) == ["model.safetensors"]
    assert list(assign_files("optimizer", specs, 60)) == ["optimizer-00001-of-00001.safetensors"]


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
        _checkpoint(world[0]).read_into([shard for shard in changed if shard is not None])
    assert not any(shard.data.count_nonzero() for shard in weights)


def test_parts_of_tensors(world: tuple[Path, Any]) -> None:
    checkpoint, (weights, state) = _checkpoint(world[0]), logical()
    assert torch.equal(checkpoint.read_tensor("pos_embed", 4, 17), weights["pos_embed"].view(-1)[4:21])
    assert checkpoint.read_tensor("logit_scale").item() == weights["logit_scale"].item()
    assert checkpoint.read_tensor("empty").numel() == 0
    assert checkpoint.read_tensor("head.bias.step").item() == 2**53 + 1
    assert torch.equal(checkpoint.read_tensor("blocks.2.w.exp_avg", 5), state["blocks.2.w.exp_avg"].view(-1)[5:])
    with pytest.raises(UserError, match="did you mean 'pos_embed'"):
        checkpoint.read_tensor("pos_embd")
