"""Every layout of big_vision's trees becomes the same model as its own equations say, and ours goes back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.formats import trees
from tests.formats.trees import CLASSES, DEPTH, HEADS, MLP, PATCH, SIDE, WIDTH, Tree
from vitds.checkpoint.exchange.npz import NpzWriter
from vitds.checkpoint.exchange.pretrained import open_model
from vitds.checkpoint.exchange.source import parts_of
from vitds.checkpoint.exchange.weights import WeightsFile
from vitds.errors import UserError
from vitds.models import ViTConfig, ViTForImageClassification
from vitds.models.formats import FORMATS, Outline, Piece, our_shapes

POOLS = ("map", "gap", "token")
BESIDE = {"opt/0/mu": np.zeros(3, np.float32), "chrono/accum_step": np.zeros((), np.int64)}
TOWERS = {"params/txt/head/kernel": np.ones((2, 2), np.float32), "params/t": np.ones(1, np.float32), "params/b": np.ones(1, np.float32)}  # fmt: skip
LAYOUTS: dict[str, Callable[[Tree], Tree]] = {
    "params": lambda t: trees.under("params/", t) | BESIDE,
    "opt/target": lambda t: trees.under("opt/target/", t) | {"opt/state/step": np.zeros((), np.int32)},
    "bare": lambda t: dict(t),
    "img": lambda t: trees.under("params/img/", t) | TOWERS,
    "bare img": lambda t: trees.under("img/", t) | {"txt/head/kernel": np.ones((2, 2), np.float32)},
    "scan": lambda t: trees.under("params/", trees.scanned(t)),
    "aged": lambda t: trees.under("opt/target/", trees.aged(t)),
    "aged scan": lambda t: trees.aged(trees.scanned(t)),
    "position in the transformer": lambda t: {
        k.replace("pos_embedding", "Transformer/pos_embedding"): v for k, v in trees.under("params/", t).items()
    },
}


def images(batch: int = 2) -> np.ndarray:
    side = SIDE * PATCH
    return np.random.default_rng(5).uniform(-1, 1, (batch, side, side, 3))


def agrees(path: Path, tree: Tree, tolerance: float = 1e-10) -> None:
    """The opened model, in float64, against the equations."""
    opened = open_model(path, dtype=torch.float64)
    pixels = torch.from_numpy(images().transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        logits = opened.model(pixels).logits
        pooled = opened.model(pixels, features_only=True).logits
    for ours, theirs in zip((pooled, logits), trees.features(tree, images()), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=tolerance * np.abs(theirs).max())
    assert opened.format == "big_vision"
    assert opened.step is None
    assert opened.processor.crop_size["height"] == SIDE * PATCH


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pool", POOLS)
def test_the_imported_model_computes_what_the_equations_say(tmp_path: Path, pool: str, layout: str) -> None:
    tree = trees.tree(pool)
    agrees(trees.save(tmp_path / "m.npz", LAYOUTS[layout](tree)), tree)


@pytest.mark.parametrize("layout", ["params", "aged", "scan"])
def test_a_class_tokens_entry_of_the_position_embedding_goes_into_the_token(tmp_path: Path, layout: str) -> None:
    tree = trees.with_class_entry(trees.tree("token"))
    agrees(trees.save(tmp_path / "m.npz", LAYOUTS[layout](tree)), tree, tolerance=1e-7)  # their sum is fp32


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("deflated", [False, True])
def test_stored_otherwise_it_is_the_same_model(tmp_path: Path, pool: str, deflated: bool) -> None:
    """bfloat16 as voids, half precision, column-major arrays; deflated members read in any order."""
    tree = trees.tree(pool, classes=0)
    voids, rounded = trees.as_bf16(tree)
    for given, expected in (
        (voids, rounded),
        ({k: v.astype(np.float16) for k, v in tree.items()}, {k: v.astype(np.float16) for k, v in tree.items()}),
        ({k: np.asfortranarray(v) for k, v in tree.items()}, tree),
    ):
        stored = trees.under("params/", trees.scanned(given))
        agrees(trees.save(tmp_path / "m.npz", stored, deflated=deflated), expected)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("scan", [False, True])
def test_out_and_in_again_bit_for_bit(tmp_path: Path, pool: str, scan: bool) -> None:
    """From theirs: the same arrays. The bias that the model adds by itself is in the file's."""
    tree = trees.under("params/", (trees.scanned if scan else dict)(trees.tree(pool)))
    weights = WeightsFile(trees.save(tmp_path / "m.npz", tree))
    config = weights.config({"init_head_bias": -2.0})
    assert (config.width, config.depth, config.mlp_dim, config.num_heads) == (WIDTH, DEPTH, MLP, HEADS)
    assert (config.patch_size, config.image_size, config.num_classes, config.pool) == (
        PATCH,
        SIDE * PATCH,
        CLASSES,
        pool,
    )

    def ours(piece: Piece) -> torch.Tensor:
        whole = weights.read_tensor(piece.key).view(weights.specs[piece.key].shape)
        return whole if piece.rows is None else whole[slice(*piece.rows)]  # type: ignore[misc]

    writer = NpzWriter(tmp_path / "again.npz")
    for name, conversion in FORMATS["big_vision"].outgoing(config, scan=scan).items():
        writer.write(name, conversion.shape, torch.float32, parts_of(conversion, ours))
    writer.commit()
    again = dict(np.load(tmp_path / "again.npz"))
    tree["params/head/bias"] = tree["params/head/bias"] - np.float32(2)
    assert again.keys() == tree.keys()
    for name, value in tree.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    assert (
        list(tmp_path.iterdir()) == [tmp_path / "again.npz", tmp_path / "m.npz"] or len(list(tmp_path.iterdir())) == 2
    )


def test_the_outline_has_the_models_own_shapes() -> None:
    for pool in POOLS:
        for classes in (0, CLASSES):
            config = ViTConfig(
                width=WIDTH, depth=DEPTH, mlp_dim=MLP, num_heads=HEADS, patch_size=PATCH, image_size=22, pool=pool, num_classes=classes
            )  # fmt: skip
            with torch.device("meta"):
                model = ViTForImageClassification(config)
            assert our_shapes(Outline.of(config)) == model.shapes
            for name, conversion in FORMATS["vitds"].outgoing(config).items():
                assert conversion.identical == (None if name == "head.bias" and config.init_head_bias else name)


def without(*keys: str) -> Callable[[Tree], Tree]:
    return lambda t: {k: v for k, v in t.items() if k not in keys}


QUERY = "params/Transformer/encoderblock_1/MultiHeadDotProductAttention_0/query/kernel"
BAD: dict[str, tuple[Callable[[Tree], Tree], str]] = {
    "unknown layout": (
        lambda t: {k.replace("embedding/kernel", "stem/kernel"): v for k, v in t.items()},
        "of no format known here (vitds, big_vision",
    ),
    "a block is missing": (
        lambda t: {k: v for k, v in t.items() if "encoderblock_1/" not in k},
        f"no tensor '{QUERY.removeprefix('params/')}' there, although there are blocks up to 2",
    ),
    "a tensor is missing": (without("params/head/bias"), "no tensor 'params/head/bias' there"),
    "a tensor of a block is missing": (
        without(QUERY.replace("query/kernel", "out/bias")),
        "no tensor 'params/Transformer/encoderblock_1/MultiHeadDotProductAttention_0/out/bias' there",
    ),
    "another shape": (
        lambda t: t | {QUERY: t[QUERY].reshape(WIDTH, HEADS * 2, -1)},
        f"tensor '{QUERY}' has shape (24, 6, 4) there, (24, 3, 8) was expected",
    ),
    "a name misspelt": (
        lambda t: t | {"params/head/biass": t["params/head/bias"]},
        "tensor 'params/head/biass': nothing here asks for it (did you mean 'params/head/bias'?)",
    ),
    "a layer that no model here has": (
        lambda t: t | {"params/pre_logits/kernel": t["params/head/kernel"]},
        "tensor 'params/pre_logits/kernel': the model has a layer before its classifier (rep_size)",
    ),
    "a name outside the tree": (
        lambda t: t | {"ema/head/bias": t["params/head/bias"]},
        "tensor 'ema/head/bias': nothing here asks for it (did you mean 'params/head/bias'?)",
    ),
    "a third tower": (
        lambda t: {k.replace("params/", "params/img/"): v for k, v in t.items()} | {"params/aud/t": t["params/head/bias"]},
        "tensor 'params/aud/t': nothing here asks for it",
    ),
    "both positions": (
        lambda t: t | {"params/Transformer/pos_embedding": t["params/pos_embedding"]},
        "are both pos_embedding",
    ),
    "no square": (
        lambda t: t | {"params/pos_embedding": t["params/pos_embedding"][:, 1:]},
        "24 patches are no square",
    ),
    "other axes": (
        lambda t: t | {"params/embedding/kernel": t["params/embedding/kernel"][0]},
        "has shape (4, 3, 24) there; 4 axes were expected",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_whole_model_is_one_clear_line(tmp_path: Path, case: str) -> None:
    change, words = BAD[case]
    path = trees.save(tmp_path / "m.npz", change(trees.under("params/", trees.tree("map"))))
    with pytest.raises(UserError) as refused:
        WeightsFile(path).config()
    assert str(refused.value).startswith(f"{path}: ")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"patch_size": 8}, "patch_size: 8 is told, and the weights have 4"),
        ({"variant": "ViT-B/16"}, "width: 768 is told, and the weights have 24"),
        ({"image_size": 48}, "image_size: 48 is told, and the weights have 5×5 patches of 4 pixels, which is 20"),
        ({"num_head": 4}, "told: 'num_head' is not known (did you mean 'num_heads'?)"),
        ({"id2label": {0: "cat"}}, "id2label: 1 names are told, and the weights have 7 classes"),
    ],
)
def test_what_is_told_otherwise_than_it_is(tmp_path: Path, told: dict[str, object], words: str) -> None:
    path = trees.save(tmp_path / "m.npz", trees.tree("map"))
    with pytest.raises(UserError) as refused:
        open_model(path, told=told)
    assert words in str(refused.value)


def test_pixels_past_the_last_patch_may_be_told(tmp_path: Path) -> None:
    path = trees.save(tmp_path / "m.npz", trees.tree("map"))
    assert open_model(path, told={"image_size": 22, "loss": "softmax"}).model.config.image_size == 22
