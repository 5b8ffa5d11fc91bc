"""`vitds.init_from` takes an .npz as it takes a checkpoint: under every ZeRO stage, on any number of ranks, and as a user does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.formats import begun, trees
from tests.launching import ROOT, ranks, train
from vitds.checkpoint.exchange.pretrained import open_model
from vitds.checkpoint.exchange.weights import WeightsFile
from vitds.models import resample_position_embedding


def whole(path: Path) -> dict[str, torch.Tensor]:
    """Ours of theirs; that they are right is test_big_vision.py's."""
    weights = WeightsFile(path)
    return {name: weights.read_tensor(name).view(spec.shape) for name, spec in weights.specs.items()}


@pytest.mark.launch
@pytest.mark.parametrize("world", [2, 3])
def test_masters_begin_as_the_file_says(tmp_path: Path, world: int) -> None:
    voids, _ = trees.as_bf16(trees.tree("map"))
    trees.save(tmp_path / "from.npz", trees.under("params/", voids))
    trees.save(tmp_path / "from.scan.npz", trees.under("params/", trees.scanned(voids)), deflated=True)
    ours = whole(tmp_path / "from.npz")
    save_file({name: value.bfloat16() for name, value in ours.items()}, tmp_path / "from.safetensors")
    same = ours | {"head.bias": ours["head.bias"] + 2}  # the model adds −2 by itself
    save_file(same, tmp_path / "same.expected.safetensors")
    fresh = {"head.weight": torch.zeros(4, trees.WIDTH), "head.bias": torch.zeros(4)}
    other = ours | fresh | {"pos_embed": resample_position_embedding(ours["pos_embed"], 49)}
    save_file(other, tmp_path / "other.expected.safetensors")
    done = ranks(world, Path(begun.__file__), tmp_path)
    assert (tmp_path / "found.json").exists(), done.stdout[-4000:]
    assert [json.loads((tmp_path / f"differing{rank}.json").read_text()) for rank in range(world)] == [[]] * world
    said = json.loads((tmp_path / "found.json").read_text())["said"]
    assert len(said) == 6
    for key, words in said.items():
        told = "; ".join(words)
        assert ("classifier kept" if key.startswith("same") else "7 classes there, 4 here") in told
        assert ("resampled from 25 to 49 patches" in told) == key.startswith("other")


SHAPE = {**begun.SHAPE, "num_classes": 10, "image_size": trees.SIDE * trees.PATCH}
SETS = [
    *(f"vitds.model.{name}={value}" for name, value in SHAPE.items()), "vitds.init_from.head=keep", "vitds.train.total_steps=1",
    'vitds.data.train.transforms=["resize"]', 'vitds.data.eval.transforms=["resize"]', "scheduler.params={}",
    "train_batch_size=24", "train_micro_batch_size_per_gpu=6", "vitds.model.loss=softmax", "optimizer.params.lr=1e-30",
]  # fmt: skip


@pytest.mark.launch
def test_a_run_begins_with_an_npz_and_its_checkpoint_is_that_model(tmp_path: Path) -> None:
    """Through `deepspeed` on two ranks, one step with no rate to speak of; then the run's directory is opened by name."""
    tree = trees.tree("map", classes=10)
    path = trees.save(tmp_path / "vit.npz", trees.under("opt/target/", trees.aged(tree)))
    digits, run = tmp_path / "digits.json", tmp_path / "run"
    section = json.loads((ROOT / "ds_configs" / "digits.json").read_text())
    section["vitds"].pop("fewshot", None)  # its sets are of the run file's own image size
    digits.write_text(json.dumps(section))
    done = train(2, digits, run, f"vitds.init_from.path={path}", *SETS)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"weights from {path}" in done.stdout
    opened = open_model(run, dtype=torch.float64)
    assert (opened.format, opened.step, opened.path.name) == ("vitds", 1, "step-000000001")
    assert opened.model.config.init_head_bias == -2.0
    images = np.random.default_rng(0).uniform(-1, 1, (3, 20, 20, 3))
    with torch.no_grad():
        logits = opened.model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).logits
    np.testing.assert_allclose(logits.numpy(), trees.features(tree, images)[1], rtol=0, atol=1e-6)

    npz = trees.save(tmp_path / "narrow.npz", {k: v for k, v in tree.items() if "encoderblock_2" not in k})
    done = train(2, digits, tmp_path / "no", f"vitds.init_from.path={npz}", *SETS)
    assert done.returncode == 2, done.stdout[-3000:]
    assert f"{npz} holds another model than vitds.model: depth: 2 there, 3 here" in done.stdout
