"""Weights of any format under our own names, whole or as the slices that ranks hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vitds.checkpoint.exchange.npz import Npz
from vitds.checkpoint.exchange.source import SafetensorsSource, Source
from vitds.checkpoint.files import read_json
from vitds.checkpoint.format import EMA, MANIFEST, MODEL, Manifest, index_name, read_tensors
from vitds.checkpoint.load import agreed, check_share, shared_out
from vitds.checkpoint.reading import agree, mismatches, read, refuse
from vitds.checkpoint.tensorfile import StoredTensor, TensorSpec, read_header
from vitds.checkpoint.whole import check_whole
from vitds.errors import UserError, nearest
from vitds.layout import Shard
from vitds.models.config import ViTConfig
from vitds.models.formats import FORMATS, Conversion, Format, Outline, Part, Piece, check_words, config_of, format_of
from vitds.models.formats.words import one
from vitds.models.shapes import variant_shape

CONFIG = "config.json"


def open_weights(path: Path, kind: str = MODEL, verify: str = "full") -> WeightsFile:
    """Weights to start from, checked as those of a resume where there are sums to check by. Collective over all ranks.

    Args:
        path: anything `WeightsFile` opens.
        kind: MODEL, or EMA for the average that a directory holds beside its weights.
        verify: "full" hashes a checkpoint's files, and reads an .npz through for its own sums; "size" does not.

    Raises:
        UserError: on all ranks, see `WeightsFile`; or content that is not what was saved.
    """

    def checked() -> WeightsFile:
        weights = WeightsFile(path, kind)
        if verify == "full":
            weights.check_share()
        return weights

    weights, reason = agreed(checked)
    if weights is None:
        raise UserError(reason)
    return weights


class WeightsFile:
    """Weights to start from: a checkpoint directory, a Hugging Face directory, a .safetensors file or an .npz.

    In any of vitds.models.formats; `specs` and what is read are in our names and shapes. Stored as fp32, bf16 or fp16;
    read as fp32. Files of a Hugging Face directory may be links, as in its cache.
    """

    def __init__(self, path: Path, kind: str = MODEL) -> None:
        """Read headers only.

        Args:
            path: the directory or file.
            kind: MODEL, or EMA for the average that a directory holds beside its weights.

        Raises:
            UserError: nothing there that holds weights, only pickles, files that cannot be right, names of no known
                format, or a model that is not whole.
        """
        self.path = path
        self.manifest: Manifest | None = None
        self.source = self._open(path, kind)
        shapes = self.source.shapes
        with self._naming():
            self.format: Format = FORMATS["vitds"] if self.manifest is not None else format_of(shapes)
            self.conversions: dict[str, Conversion] = (
                {name: Conversion(shape, (one(shape, Piece(name)),)) for name, shape in shapes.items()}
                if self.manifest is not None
                else self.format.incoming(shapes)
            )

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Our name and shape of every tensor, and the dtype in which it is stored."""
        return {
            name: TensorSpec(name, there.shape, self.source.specs[there.parts[0].pieces[0].key].dtype)
            for name, there in self.conversions.items()
        }

    @cached_property
    def outline(self) -> Outline:
        """What names and shapes tell of the model; UserError where they are of none."""
        with self._naming():
            return self.format.outline(self.source.shapes)

    @cached_property
    def told(self) -> dict[str, Any]:
        """What a config.json beside the weights says of the model, in ViTConfig's words; {} where there is none.

        It may be of another format than the names: timm's of weights that have ours.
        """
        place = self.path if self.path.is_dir() else self.path.parent
        if isinstance(self.source, Npz) or not (place / CONFIG).is_file():
            return {}
        saved = read_json(place / CONFIG)
        told = next(filter(None, (each.told(saved) for each in (self.format, *FORMATS.values()))), {})
        try:
            check_words(told)
        except UserError as error:
            raise UserError(f"{place / CONFIG}: {error}") from None
        return told

    @property
    def constant(self) -> float:
        """What the model adds to its logits beyond the classifier's bias (init_head_bias): 0 unless a config.json of
        ours says so, because a file of any other format holds it in that bias."""
        return float(self.told.get("init_head_bias") or 0.0)

    def config(self, told: dict[str, Any] | None = None) -> ViTConfig:
        """The model's configuration.

        Args:
            told: ViTConfig's words, and `variant`; they come before config.json's, but not its heads: those would make
                another model of the same weights.

        Raises:
            UserError: something that is told and is not so, or that nothing tells.
        """
        with self._naming():
            words = dict(told or {})
            if isinstance(words.get("variant"), str):  # what is told by it comes before config.json's, too
                words = {**vars(variant_shape(words.pop("variant"))), **words}
            there = dict(self.told)
            if words.get("loss", there.get("loss")) != there.get("loss"):
                there.pop("problem_type", None)  # follows from the loss
            found, heads = config_of(self.outline, {**there, **words}), there.get("num_heads")
            if heads is not None and heads != found.num_heads:
                raise UserError(f"num_heads: {found.num_heads} is told, and its {CONFIG} has {heads}")
            return found

    @property
    def facts(self) -> dict[str, Any]:
        """All that is known of the model in ViTConfig's words: config.json's, heads that show, and `constant`."""
        heads = self.outline.num_heads or self.told.get("num_heads")
        return {**self.told, **({"num_heads": heads} if heads else {}), "init_head_bias": self.constant}

    @property
    def files(self) -> set[str]:
        """Names of the files of a directory in which they lie."""
        return {there.path.name for there in self.source.stored.values()} if isinstance(self.source, SafetensorsSource) else set()  # fmt: skip

    def check_share(self) -> None:
        """Hash this rank's share of what has a sum (UserError)."""
        if self.manifest is not None:
            check_share(self.path, self.manifest, self.files)
        elif isinstance(self.source, Npz):
            keys = {piece.key for there in self.conversions.values() for part in there.parts for piece in part.pieces}
            self.source.check(shared_out({key: self.source.specs[key].nbytes for key in keys}))

    def read_into(self, shards: list[Shard]) -> None:
        """Fill the shards' live data, cast to fp32; tensors that no shard asks for are left alone. Collective.

        What is stored as it is needed is read by the slice; what has to be turned over is read and turned a piece at a
        time, never more than one of the file's tensors (or one layer of a stacked one).

        Raises:
            UserError: on all ranks: a tensor missing, of another shape, or not of floats; with the nearest name.
        """
        agree(mismatches(self.specs, shards, exact=False), self.path)
        problems = []
        try:
            self._fill(shards)
        except (UserError, OSError) as error:
            problems.append(str(error))
        agree(problems, self.path)

    def read_tensor(self, name: str, start: int = 0, numel: int | None = None) -> torch.Tensor:
        """Elements [start, start + numel) of a tensor, flattened: (numel,) fp32 on the CPU."""
        if name not in self.specs:
            raise UserError(f"{self.path}: no tensor {name!r} there{nearest(name, self.specs)}")
        spec = self.specs[name]
        data = torch.empty(spec.numel - start if numel is None else numel, dtype=torch.float32)
        shard = Shard(name, spec.shape, data, start)
        refuse(mismatches(self.specs, [shard], exact=False), self.path)
        self._fill([shard])
        return data

    def _fill(self, shards: list[Shard]) -> None:
        direct: list[tuple[StoredTensor, Shard]] = []
        turned: list[tuple[Any, Part, int, Shard]] = []
        for shard in shards:
            there, begin = self.conversions[shard.name], 0
            if there.identical is not None and isinstance(self.source, SafetensorsSource):
                direct.append((self.source.stored[there.identical], shard))
                continue
            for part in there.parts:
                numel = torch.Size(part.shape).numel()
                if begin < shard.start + shard.data.numel() and shard.start < begin + numel:
                    place = [(self.source.place(p.key), p.rows if isinstance(p.rows, int) else 0) for p in part.pieces]
                    turned.append((place, part, begin, shard))
                begin += numel
        read(direct)
        for _, part, begin, shard in sorted(turned, key=lambda item: item[0]):
            value = part.combine([self.source.read(piece) for piece in part.pieces]).reshape(-1)
            start, end = max(begin, shard.start), min(begin + value.numel(), shard.start + shard.data.numel())
            shard.data.detach()[start - shard.start : end - shard.start].copy_(value[start - begin : end - begin])

    def _open(self, path: Path, kind: str) -> Source:
        if path.is_file():
            if path.suffix == ".npz":
                return Npz(path)
            return SafetensorsSource(path, read_header(path) if path.suffix == ".safetensors" else _no_weights(path))
        if (path / MANIFEST).exists():
            self.manifest = check_whole(path)
        elif not _holds(path, MODEL):
            _no_weights(path)
        if not _holds(path, kind):
            why = ", no average of its weights (vitds.ema.decay keeps one)" if kind == EMA else ""
            raise UserError(f"{path}: holds no {kind}{why}: neither {kind}.safetensors nor {index_name(kind)} is there")
        return SafetensorsSource(path, read_tensors(path, kind))

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """Formats know no file: it is put before what they say."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None


def _holds(path: Path, kind: str) -> bool:
    return (path / f"{kind}.safetensors").exists() or (path / index_name(kind)).exists()


def _no_weights(path: Path) -> dict[str, StoredTensor]:
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    steps = sorted(path.glob("checkpoints/step-*[0-9]")) or sorted(path.glob("step-*[0-9]"))
    if steps:
        raise UserError(f"{path}: holds checkpoints, not weights; name one of them, as {steps[-1]}")
    found = [path] if path.is_file() else sorted(path.iterdir())
    pickles = [file.name for file in found if file.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    if pickles:
        raise UserError(
            f"{path}: {pickles[0]} is a pickle, which may run code and is not loaded; save it as safetensors"
        )
    raise UserError(
        f"{path}: no weights: expected {MODEL}.safetensors, {index_name(MODEL)}, a .safetensors file or an .npz"
    )
