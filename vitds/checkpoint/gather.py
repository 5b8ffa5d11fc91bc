"""Whole tensors from the pieces that the ranks hold, as a stream of bytes to one writer.

Metadata travels once; after it every rank knows who holds which elements of what, and data goes from its holder to the
writer in chunks of at most CHUNK_BYTES. No rank ever holds a whole tensor for this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as torch_dist

from vitds import dist
from vitds.checkpoint.tensorfile import DTYPE_NAMES, TensorSpec, bytes_of
from vitds.layout import Shard

CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a tensor, in the `index`-th shard of `rank`."""

    rank: int
    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class Gathered:
    """A logical tensor and the pieces that tile it exactly once, in order."""

    spec: TensorSpec
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class _Row:
    """What one rank says of one of its shards."""

    spec: TensorSpec
    start: int
    numel: int
    anywhere: bool
    """The shard is a whole tensor that any of its holders may give."""


def agree_on_tensors(shards: list[Shard], writer: int) -> dict[str, Gathered]:
    """Every logical tensor of all ranks by name; the same on every rank. Collective.

    A tensor that is replicated, or in no group, is taken whole from the writer where it has it, else from the first
    rank that does; every other must be tiled by its shards.

    Raises:
        RuntimeError: on all ranks, naming the tensor: an element that no rank or more than one holds, ranks that
            disagree on a shape or dtype, a dtype that checkpoints do not know.
    """
    rows = dist.all_objects([_row(shard) for shard in shards])
    held: dict[str, list[tuple[_Row, Piece]]] = {}
    for rank, of_rank in enumerate(rows):
        for index, row in enumerate(of_rank):
            piece = Piece(rank, index, row.start, row.start + row.numel)
            held.setdefault(row.spec.name, []).append((row, piece))
    return {name: _tiled(name, found, writer) for name, found in held.items()}


def _row(shard: Shard) -> _Row:
    assert shard.data.dim() == 1, f"{shard.name}: a shard's data is 1-D, not {tuple(shard.data.shape)}"
    spec, numel = TensorSpec(shard.name, tuple(shard.shape), shard.data.dtype), shard.data.numel()
    return _Row(spec, shard.start, numel, (shard.replicated or shard.group is None) and numel == shard.total)


def _tiled(name: str, found: list[tuple[_Row, Piece]], writer: int) -> Gathered:
    spec, first = found[0][0].spec, found[0][1].rank
    for row, piece in found:
        if row.spec != spec:
            raise RuntimeError(
                f"tensor {name!r} is {spec.dtype} {spec.shape} on rank {first} "
                f"and {row.spec.dtype} {row.spec.shape} on rank {piece.rank}"
            )
    if spec.dtype not in DTYPE_NAMES:
        raise RuntimeError(f"tensor {name!r}: checkpoints do not hold {spec.dtype}")
    whole = [piece for row, piece in found if row.anywhere]
    if whole:
        return Gathered(spec, (min(whole, key=lambda piece: (piece.rank != writer, piece.rank)),))
    pieces = sorted((piece for _, piece in found if piece.stop > piece.start), key=lambda piece: piece.start)
    cursor, before = 0, -1
    for piece in pieces:
        if piece.start > cursor:
            raise RuntimeError(f"tensor {name!r}: no rank holds its elements [{cursor}, {piece.start})")
        if piece.start < cursor:
            raise RuntimeError(
                f"tensor {name!r}: ranks {before} and {piece.rank} both hold its elements from {piece.start} on"
            )
        cursor, before = piece.stop, piece.rank
    if cursor != spec.numel:
        raise RuntimeError(
            f"tensor {name!r}: no rank holds its elements [{cursor}, {spec.numel}), or it has not so many"
        )
    return Gathered(spec, tuple(pieces))


def stream(tensor: Gathered, shards: list[Shard], writer: int) -> Iterator[memoryview]:
    """The tensor's bytes in order, chunk by chunk: yielded on the writer; elsewhere nothing, the chunks are sent.

    Every rank must run it to its end, for the same tensors in the same order.

    Args:
        tensor: from `agree_on_tensors`.
        shards: this rank's, as they were given there.
        writer: the rank that receives.
    """
    me, step = dist.rank(), max(1, CHUNK_BYTES // tensor.spec.dtype.itemsize)
    for piece in tensor.pieces:
        if me not in (piece.rank, writer):
            continue
        for begin in range(piece.start, piece.stop, step):
            numel = min(step, piece.stop - begin)
            if piece.rank == me:
                shard = shards[piece.index]
                chunk = shard.data.detach()[begin - shard.start : begin - shard.start + numel].contiguous()
                if me == writer:
                    yield bytes_of(chunk.cpu())
                else:
                    torch_dist.send(chunk.view(torch.uint8).to(_wire()), writer)
            else:
                chunk = torch.empty(numel * tensor.spec.dtype.itemsize, dtype=torch.uint8, device=_wire())
                torch_dist.recv(chunk, piece.rank)
                yield bytes_of(chunk.cpu())


def _wire() -> torch.device:
    """Where a tensor must lie to be sent: gloo sends from the CPU, the accelerators' libraries from the device."""
    return torch.device("cpu") if torch_dist.get_backend() == "gloo" else dist.device()
