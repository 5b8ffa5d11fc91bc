"""What a model can be written as: the files of each format, and the call that opens them elsewhere."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vitds.checkpoint.exchange.given import README, Given
from vitds.checkpoint.exchange.npz import NpzWriter
from vitds.checkpoint.exchange.pretrained import PROCESSOR
from vitds.checkpoint.exchange.source import parts_of
from vitds.checkpoint.files import sync_directory, to_json, write_bytes
from vitds.checkpoint.format import MODEL, file_names, index_json, index_name
from vitds.checkpoint.tensorfile import TensorFileWriter, TensorSpec, bytes_of
from vitds.errors import UserError
from vitds.models import ViTConfig, model_card
from vitds.models.card import timm_call
from vitds.models.formats import FORMATS, Conversion
from vitds.models.formats.siglip import lost, siglip_config, stock_processor
from vitds.models.formats.timm import timm_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FILE_BYTES = 5_000_000_000
"""Weights of a directory are in files of at most so many bytes, as checkpoints' are."""


@dataclass(frozen=True)
class Asked:
    """How to write, where a format leaves a choice."""

    dtype: str = "fp32"
    scan: bool = False
    file_bytes: int = FILE_BYTES


@dataclass
class Written:
    """What there is to say of an output."""

    opens: str
    """The call or command that opens it; OUTPUT stands for its path."""
    tensors: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Target:
    """One format: `write(given, path, asked)` makes the file or directory `path`, which is not there yet."""

    about: str
    suffix: str | None
    """Of its one file; None where it is a directory."""
    write: Callable[[Given, Path, Asked], Written]
    needs: tuple[str, ...] = ()
    """Packages without which it cannot be written."""
    only: Mapping[str, str] = field(default_factory=dict)
    """Options that have one value here."""


def write_vitds(given: Given, path: Path, asked: Asked) -> Written:
    """A checkpoint's model part: our names, configuration, image processor and card, as it was where the model is the same."""
    config = given.config
    plain = ViTConfig(**{**config.to_dict(), "init_head_bias": 0.0})  # stays in the configuration, as in a checkpoint
    count = _directory(
        path, FORMATS["vitds"].outgoing(plain), given, asked,
        {"config.json": _json(config.to_json_string(use_diff=False)), PROCESSOR: _json(given.processor.to_json_string()),
         README: (given.card or model_card(config)).encode()},
    )  # fmt: skip
    auto = "AutoModelForImageClassification"
    return Written(f"import vitds, transformers; transformers.{auto}.from_pretrained('OUTPUT')", count)


def write_safetensors(given: Given, path: Path, asked: Asked) -> Written:
    """One file of our names, which are timm's."""
    conversions = FORMATS["vitds"].outgoing(given.config)
    _tensors(path, conversions, given, DTYPES[asked.dtype])
    call = timm_call(given.config)
    opens = f"safetensors.torch.load_file('OUTPUT'), or {call[:-1]}, checkpoint_path='OUTPUT')"
    return Written(opens, len(conversions), [*_folded(given.config, asked), *_normalised(given)])


def write_timm(given: Given, path: Path, asked: Asked) -> Written:
    """A directory as timm opens it: weights and the configuration that its hub has."""
    conversions = FORMATS["timm"].outgoing(given.config)
    config = timm_config(given.config, given.processor.to_dict())
    whole = Asked(asked.dtype, file_bytes=2**62)  # timm reads one file
    count = _directory(path, conversions, given, whole, {"config.json": to_json(config)})
    opens = f"timm.create_model('local-dir:OUTPUT', pretrained=True), which is {timm_call(given.config)}"
    return Written(opens, count, _folded(given.config, asked))


def write_siglip(given: Given, path: Path, asked: Asked) -> Written:
    """A directory as stock transformers opens it."""
    conversions, config = FORMATS["siglip"].outgoing(given.config), siglip_config(given.config)
    others = {"config.json": to_json(config), PROCESSOR: to_json(stock_processor(given.processor.to_dict()))}
    count = _directory(path, conversions, given, asked, others)
    notes = [*lost(given.config), *(_folded(given.config, asked) if given.config.pool == "gap" else [])]
    return Written(f"transformers.{config['architectures'][0]}.from_pretrained('OUTPUT')", count, notes)


def write_big_vision(given: Given, path: Path, asked: Asked) -> Written:
    """An .npz as big_vision saves its parameters."""
    conversions = FORMATS["big_vision"].outgoing(given.config, scan=asked.scan)
    writer = NpzWriter(path)
    try:
        for name, conversion in conversions.items():
            parts = (_cast(part, DTYPES[asked.dtype], name) for part in parts_of(conversion, given.read))
            writer.write(name, conversion.shape, DTYPES[asked.dtype], parts)
        writer.commit()
    except BaseException:
        writer.abandon()
        raise
    config, shape = given.config, given.config.shape
    called = f"variant={config.variant.removeprefix('ViT-')!r}" if config.variant else (
        f"width={shape.width}, depth={shape.depth}, mlp_dim={shape.mlp_dim}, num_heads={shape.num_heads}, "
        f"patch_size=({shape.patch_size}, {shape.patch_size})"
    )  # fmt: skip
    pool = "tok" if config.pool == "token" else config.pool
    scan = ", scan=True" if asked.scan else ""
    model = f"vit.Model(num_classes={config.num_classes or None}, {called}, pool_type={pool!r}{scan})"
    opens = f"big_vision.models.vit.load(init_params, 'OUTPUT', model_cfg) into {model}"
    return Written(opens, len(conversions), [*_folded(config, asked), *_normalised(given)])


def write_onnx(given: Given, path: Path, asked: Asked) -> Written:
    """A graph from pixels to logits, checked before it gets its name."""
    from vitds.checkpoint.exchange.onnx_export import export

    return Written("onnxruntime.InferenceSession('OUTPUT')", 0, export(given, path))


TARGETS: dict[str, Target] = {
    "vitds": Target("a directory like a checkpoint's model: config, image processor, card, weights", None, write_vitds),
    "safetensors": Target("one .safetensors file with our names, which are timm's", ".safetensors", write_safetensors),
    "timm": Target("a directory for timm.create_model('local-dir:…')", None, write_timm),
    "siglip": Target("a directory for transformers' SigLIP classes", None, write_siglip),
    "big_vision": Target("an .npz for big_vision", ".npz", write_big_vision),
    "onnx": Target(
        "a graph for onnxruntime; needs the extra onnx",
        ".onnx",
        write_onnx,
        ("onnx", "onnxruntime", "onnxscript"),
        {"dtype": "fp32"},
    ),
}


def _directory(
    path: Path, conversions: Mapping[str, Conversion], given: Given, asked: Asked, others: Mapping[str, bytes]
) -> int:
    """Weights in files of at most `file_bytes`, an index where there are several, and the small files beside them;
    returns how many tensors there are."""
    path.mkdir()
    dtype = DTYPES[asked.dtype]
    shares: list[dict[str, Conversion]] = [{}]
    filled = 0
    for name, conversion in conversions.items():
        nbytes = math.prod(conversion.shape) * dtype.itemsize
        if shares[-1] and filled + nbytes > asked.file_bytes:
            shares.append({})
            filled = 0
        shares[-1][name] = conversion
        filled += nbytes
    files = dict(zip(file_names(MODEL, len(shares)), shares, strict=True))
    specs = {file: _tensors(path / file, share, given, dtype) for file, share in files.items()}
    if len(files) > 1:
        write_bytes(path / index_name(MODEL), index_json(specs))
    for name, content in others.items():
        write_bytes(path / name, content)
    sync_directory(path)
    return len(conversions)


def _tensors(path: Path, conversions: Mapping[str, Conversion], given: Given, dtype: torch.dtype) -> list[TensorSpec]:
    """One safetensors file, a part of a tensor at a time."""
    specs = [TensorSpec(name, conversion.shape, dtype) for name, conversion in conversions.items()]
    writer = TensorFileWriter(path, specs)
    with _abandoned(writer):
        for name, conversion in conversions.items():
            for part in parts_of(conversion, given.read):
                writer.write(bytes_of(_cast(part, dtype, name)))
        writer.close()
    return specs


@contextlib.contextmanager
def _abandoned(writer: TensorFileWriter) -> Iterator[None]:
    try:
        yield
    except BaseException:
        writer.abandon()
        raise


def _cast(part: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """A part in the dtype it is written in, contiguous.

    Raises:
        UserError: a number that only fp32 and bf16 can hold.
    """
    out = part.to(dtype).contiguous()
    if dtype == torch.float16 and bool((out.isinf() & part.isfinite()).any()):
        most = part[part.isfinite()].abs().max().item()
        raise UserError(
            f"--dtype: tensor {name!r} has a value of {most:.3g}, and fp16 ends at 65504; bf16 and fp32 hold it"
        )
    return out


def _folded(config: ViTConfig, asked: Asked) -> list[str]:
    """What became of the constant that our model adds to its logits."""
    if not config.num_classes or config.init_head_bias == 0:
        return []
    coarse = f"; {asked.dtype} holds such a sum only roughly" if asked.dtype != "fp32" else ""
    return [f"init_head_bias ({config.init_head_bias:g}) is added to the classifier's bias{coarse}"]


def _normalised(given: Given) -> list[str]:
    """What a file by itself does not say of its images, where that is not the usual."""
    mean, std = given.processor.image_mean, given.processor.image_std
    if mean == std == [0.5, 0.5, 0.5]:
        return []
    return [f"its images are normalised by mean {mean} and standard deviation {std}, which the file does not say"]


def _json(text: str) -> bytes:
    return (text.rstrip("\n") + "\n").encode()
