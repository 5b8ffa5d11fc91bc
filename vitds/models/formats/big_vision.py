"""big_vision's parameter trees, flattened with slashes, as its .npz files hold them.

Kernels are (inputs, outputs), those of attention (D, H, d) and (H, d, D): heads show in the shapes. Read is every
layout that its loader accepts: the tree under `params/`, `opt/target/`, or bare, or the `img/` branch of a two-tower
model; blocks one by one or stacked (`scan`); the names of older releases and of AugReg; a position embedding with an
entry for the [class] token, which is then added to the token itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from vitds.errors import UserError
from vitds.models.config import ViTConfig
from vitds.models.formats.ours import axes, with_constant
from vitds.models.formats.outline import Outline, our_shapes
from vitds.models.formats.ties import Tie, check, incoming, numbered, outgoing, their_shapes
from vitds.models.formats.words import Change, Conversion, Part, Piece, Shapes, same

TREES = ("params/img/", "opt/target/img/", "img/", "params/", "opt/target/", "")
"""Where the image tower may lie, the more particular first."""
BESIDE_TREE = ("opt/", "chrono/", "extra/")
"""The rest of a training state: optimizer, clock, counters."""
BESIDE_TOWER = re.compile(r"(txt/.*|t|b)")
"""The rest of a two-tower model: the text tower, temperature, bias."""
BLOCKS, STACKED = "Transformer/encoderblock_", "Transformer/encoderblock/"
OLD_PARTS = {"LayerNorm_2": "LayerNorm_1", "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0", "MlpBlock_3": "MlpBlock_0"}  # fmt: skip
"""Parts of a block in older releases, which numbered them together."""
OLD_POSITIONS = ("Transformer/posembed_input/pos_embedding", "Transformer/pos_embedding")
MAP, MAP_PARTS = "MAPHead_0/", ("probe", "MultiHeadDotProductAttention_0/", "LayerNorm_0/", "MlpBlock_0/")
"""The MAP head, and what of it older releases had at the top of the tree."""


class Layout(NamedTuple):
    """How a tree is laid out, apart from the model it is of."""

    scan: bool
    class_entry: bool
    """The position embedding has an entry for the [class] token, before the others."""


class BigVision:
    """Format "big_vision"."""

    name = "big_vision"

    def recognise(self, shapes: Shapes) -> bool:
        """There is an embedding kernel where one may lie."""
        return any(f"{tree}embedding/kernel" in shapes for tree in TREES)

    def outline(self, shapes: Shapes) -> Outline:
        """Everything of a model but its image size beyond whole patches: heads are axes of the kernels."""
        return _read(_canonical(shapes), shapes)[0]

    def told(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing: there is no config.json beside an .npz."""
        return {}

    def incoming(self, shapes: Shapes) -> dict[str, Conversion]:
        """Ours of theirs, in any of the layouts."""
        actual = _canonical(shapes)
        outline, layout = _read(actual, shapes)
        ties = list(_ties(outline, layout))
        expected = their_shapes(ties)
        named = {actual.get(name, _guess(name, actual)): shape for name, shape in expected.items()}
        check(named, {key: shapes[key] for key in actual.values()})
        conversions = incoming(ties, our_shapes(outline))
        if layout.class_entry:
            _split_position(conversions, outline)
        return {name: _renamed(conversion, actual) for name, conversion in conversions.items()}

    def outgoing(self, config: ViTConfig, **options: Any) -> dict[str, Conversion]:
        """Theirs of ours, under `params/`: a model of today's big_vision, which its loader and timm's take.

        Args:
            config: of the model.
            options: scan: blocks stacked (big_vision loads either, timm too); default one by one.
        """
        scan = bool(options.pop("scan", False))
        if options:
            raise UserError(f"{next(iter(options))}: format {self.name!r} has no such option; it has scan")
        ties = list(_ties(Outline.of(config), Layout(scan=scan, class_entry=False)))
        conversions = outgoing(ties, their_shapes(ties))
        if "head/bias" in conversions:
            shape, (part,) = conversions["head/bias"]
            conversions["head/bias"] = Conversion(shape, (with_constant(part, config.init_head_bias),))
        return {f"params/{name}": conversion for name, conversion in conversions.items()}


def _canonical(shapes: Shapes) -> dict[str, str]:
    """Today's name, without the tree's prefix, of every tensor of the image tower -> its key in the file.

    Raises:
        UserError: no such tree; two tensors for one name.
    """
    tree = next((tree for tree in TREES if f"{tree}embedding/kernel" in shapes), None)
    if tree is None:
        raise UserError(f"no embedding/kernel there, under none of {', '.join(t or '(nothing)' for t in TREES)}")
    parent = tree.removesuffix("img/")
    actual: dict[str, str] = {}
    for key in shapes:
        if key.startswith(tree) and (tree or not key.startswith(BESIDE_TREE)):
            name = _todays(key.removeprefix(tree))
            if name in actual:
                raise UserError(f"tensors {actual[name]!r} and {key!r} are both {name}")
            actual[name] = key
        elif not key.startswith(BESIDE_TREE) and not (
            parent != tree and key.startswith(parent) and BESIDE_TOWER.fullmatch(key.removeprefix(parent))
        ):
            actual[key] = key  # nobody will ask for it
    if any(name.startswith("pre_logits/") for name in actual):
        raise UserError(
            f"tensor {actual.get('pre_logits/kernel', 'pre_logits')!r}: the model has a layer before its classifier (rep_size), "
            "which no model here has"
        )
    return actual


def _todays(name: str) -> str:
    """The name that today's big_vision gives a parameter."""
    if name in OLD_POSITIONS:
        return "pos_embedding"
    if name.startswith(MAP_PARTS):
        return MAP + name
    block = re.fullmatch(r"(Transformer/encoderblock(?:_\d+)?)/([^/]+)/(.*)", name)
    return f"{block[1]}/{OLD_PARTS.get(block[2], block[2])}/{block[3]}" if block else name


def _read(actual: Mapping[str, str], shapes: Shapes) -> tuple[Outline, Layout]:
    """The model and the layout of a tree."""
    named = {name: tuple(shapes[key]) for name, key in actual.items()}
    scan = any(name.startswith(STACKED) for name in named)
    stacked = (0,) if scan else ()
    block = STACKED if scan else f"{BLOCKS}0/"
    query, hidden = f"{block}MultiHeadDotProductAttention_0/query/kernel", f"{block}MlpBlock_0/Dense_0/kernel"
    patch_size, _, _, width = axes(named, "embedding/kernel", 4)
    if not scan:
        depth = numbered(named, BLOCKS, query.removeprefix(f"{BLOCKS}0"))
    *layers, _, heads, _ = axes(named, query, 3 + len(stacked))
    if scan:
        depth = layers[0]
    mlp_dim = axes(named, hidden, 2 + len(stacked))[-1]
    entries = axes(named, "pos_embedding", 3)[1]
    pool = "map" if f"{MAP}probe" in named else "token" if "cls" in named else "gap"
    class_entry = (
        pool == "token" and math.isqrt(entries) ** 2 != entries and math.isqrt(entries - 1) ** 2 == entries - 1
    )
    classes = axes(named, "head/kernel", 2)[1] if "head/kernel" in named else 0
    outline = Outline(width, depth, mlp_dim, patch_size, entries - class_entry, pool, classes, heads)
    if width % heads:
        raise UserError(f"tensor {actual[query]!r} has shape {named[query]} there: {heads} heads do not divide {width}")
    return outline, Layout(scan, class_entry)


def _ties(outline: Outline, layout: Layout) -> Iterator[Tie]:
    """Which of theirs is which of ours; their names without a prefix."""
    width, patch, entries = outline.width, outline.patch_size, outline.num_patches
    yield Tie(
        Piece("embedding/kernel"), Piece("patch_embed.proj.weight"), (patch, patch, 3, width), (width, 3, patch, patch),
        lambda kernel: kernel.permute(3, 2, 0, 1), lambda weight: weight.permute(2, 3, 1, 0),
    )  # fmt: skip
    yield _plain("embedding/bias", "patch_embed.proj.bias", (width,))
    yield _plain("pos_embedding", "pos_embed", (1, entries + layout.class_entry, width), (1, entries, width))
    if outline.pool == "token":
        yield _plain("cls", "cls_token", (1, 1, width))
    for i in range(outline.depth):
        theirs = STACKED if layout.scan else f"{BLOCKS}{i}/"
        for tie in _block(theirs, f"blocks.{i}.", outline):
            yield tie._replace(theirs=Piece(tie.theirs.key, i)) if layout.scan else tie
    yield from _norm("Transformer/encoder_norm", "norm", outline)
    if outline.pool == "map":
        yield _plain(f"{MAP}probe", "attn_pool.latent", (1, 1, width))
        attention = f"{MAP}MultiHeadDotProductAttention_0"
        yield from _projections(attention, ("query",), "attn_pool.q", outline)
        yield from _projections(attention, ("key", "value"), "attn_pool.kv", outline)
        yield from _out(attention, "attn_pool.proj", outline)
        yield from _norm(f"{MAP}LayerNorm_0", "attn_pool.norm", outline)
        yield from _mlp(f"{MAP}MlpBlock_0", "attn_pool.mlp", outline)
    if outline.num_classes:
        yield from _dense("head", "head", width, outline.num_classes)


def _block(theirs: str, ours: str, outline: Outline) -> Iterator[Tie]:
    attention = f"{theirs}MultiHeadDotProductAttention_0"
    yield from _norm(f"{theirs}LayerNorm_0", f"{ours}norm1", outline)
    yield from _projections(attention, ("query", "key", "value"), f"{ours}attn.qkv", outline)
    yield from _out(attention, f"{ours}attn.proj", outline)
    yield from _norm(f"{theirs}LayerNorm_1", f"{ours}norm2", outline)
    yield from _mlp(f"{theirs}MlpBlock_0", f"{ours}mlp", outline)


def _projections(theirs: str, names: tuple[str, ...], ours: str, outline: Outline) -> Iterator[Tie]:
    """Projections to heads, which ours has fused: (D, H, d) each, rows of (n·D, D)."""
    width, heads = outline.width, outline.num_heads or 1
    apart = (width, heads, width // heads)
    for i, name in enumerate(names):
        rows = (i * width, (i + 1) * width) if len(names) > 1 else None
        yield Tie(
            Piece(f"{theirs}/{name}/kernel"), Piece(f"{ours}.weight", rows), apart, (width, width),
            lambda kernel: kernel.flatten(1).T, lambda weight: weight.T.reshape(apart),
        )  # fmt: skip
        yield Tie(
            Piece(f"{theirs}/{name}/bias"), Piece(f"{ours}.bias", rows), apart[1:], (width,),
            torch.flatten, lambda bias: bias.reshape(apart[1:]),
        )  # fmt: skip


def _out(theirs: str, ours: str, outline: Outline) -> Iterator[Tie]:
    """The projection of all heads' outputs: (H, d, D) there, (D, D) here."""
    width, heads = outline.width, outline.num_heads or 1
    apart = (heads, width // heads, width)
    yield Tie(
        Piece(f"{theirs}/out/kernel"), Piece(f"{ours}.weight"), apart, (width, width),
        lambda kernel: kernel.flatten(0, 1).T, lambda weight: weight.T.reshape(apart),
    )  # fmt: skip
    yield _plain(f"{theirs}/out/bias", f"{ours}.bias", (width,))


def _mlp(theirs: str, ours: str, outline: Outline) -> Iterator[Tie]:
    yield from _dense(f"{theirs}/Dense_0", f"{ours}.fc1", outline.width, outline.mlp_dim)
    yield from _dense(f"{theirs}/Dense_1", f"{ours}.fc2", outline.mlp_dim, outline.width)


def _dense(theirs: str, ours: str, inputs: int, outputs: int) -> Iterator[Tie]:
    yield Tie(
        Piece(f"{theirs}/kernel"), Piece(f"{ours}.weight"), (inputs, outputs), (outputs, inputs), torch.t, torch.t
    )
    yield _plain(f"{theirs}/bias", f"{ours}.bias", (outputs,))


def _norm(theirs: str, ours: str, outline: Outline) -> Iterator[Tie]:
    yield _plain(f"{theirs}/scale", f"{ours}.weight", (outline.width,))
    yield _plain(f"{theirs}/bias", f"{ours}.bias", (outline.width,))


def _plain(
    theirs: str, ours: str, shape: tuple[int, ...], our_shape: tuple[int, ...] | None = None, change: Change = same
) -> Tie:
    return Tie(Piece(theirs), Piece(ours), shape, our_shape or shape, change, change)


def _split_position(conversions: dict[str, Conversion], outline: Outline) -> None:
    """The [class] token's entry of the position embedding goes into the token: ours gets none after it is put there."""
    position, token = (1, outline.num_patches, outline.width), (1, 1, outline.width)
    both = (Piece("cls"), Piece("pos_embedding"))
    patches = Part(position, (Piece("pos_embedding"),), lambda pieces: pieces[0][:, 1:])
    added = Part(token, both, lambda pieces: pieces[0] + pieces[1][:, :1])
    conversions["pos_embed"] = Conversion(position, (patches,))
    conversions["cls_token"] = Conversion(token, (added,))


def _renamed(conversion: Conversion, actual: Mapping[str, str]) -> Conversion:
    """With the file's keys for today's names."""
    return conversion._replace(
        parts=tuple(
            part._replace(pieces=tuple(piece._replace(key=actual[piece.key]) for piece in part.pieces))
            for part in conversion.parts
        )
    )


def _guess(name: str, actual: Mapping[str, str]) -> str:
    """The key that a missing tensor would have in this file."""
    there = actual["embedding/kernel"]
    return there.removesuffix("embedding/kernel") + name
