"""What the ranks hold, agreed upon, and its way to the ranks that write it.

Metadata travels once; after it every rank knows who holds which elements of what and computes the same plan. Data
travels in rounds of one all-to-all each, through one buffer: no rank ever holds a whole tensor for this.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as torch_dist

from vitds import dist
from vitds.checkpoint.format import EMA, MODEL, OPTIMIZER
from vitds.checkpoint.plan import Piece, PlannedFile, Round, Segment, Tiled, assign_files, rounds, shares
from vitds.checkpoint.tensorfile import DTYPE_NAMES, TensorSpec
from vitds.layout import Shard

Tensors = Mapping[str, list[Shard]]
"""Shards of one rank, by kind."""


@dataclass(frozen=True)
class Row:
    """What one rank says of one of its shards."""

    spec: TensorSpec
    start: int
    numel: int
    anywhere: bool
    """The shard is a whole tensor that any of its holders may give."""


@dataclass(frozen=True)
class Plan:
    """One way of saving one set of shards: the files, and this rank's part of the work."""

    kinds: list[str]
    files: list[PlannedFile]
    share_bytes: list[int]
    """Bytes of tensors that each rank writes."""
    rounds: list[Round]
    hosts: list[str]
    """Of each rank."""

    @property
    def own_files(self) -> list[PlannedFile]:
        """The files that this rank writes, in the order in which its share arrives."""
        return [file for file in self.files if file.writer == dist.rank()]


def rows_of(tensors: Tensors) -> dict[str, list[Row]]:
    """Everything about this rank's shards that a plan depends on."""
    return {kind: [_row(shard) for shard in shards] for kind, shards in tensors.items()}


def agree_on_plan(rows: dict[str, list[Row]], bucket_bytes: int, file_bytes: int, min_file_bytes: int) -> Plan:
    """The plan of all ranks' rows. Collective.

    A tensor that is replicated, or in no group, is taken whole from one rank, its writer where that has it; every
    other must be tiled by its shards.

    Raises:
        RuntimeError: on all ranks, naming the tensor: an element that no rank or more than one holds, ranks that
            disagree on a shape or dtype, weights that are not fp32, a dtype that checkpoints do not know.
    """
    answers = dist.all_objects((rows, socket.gethostname()))
    tensors: dict[str, dict[str, Tiled]] = {}
    for kind in (MODEL, OPTIMIZER, EMA):
        if any(kind in of_rank for of_rank, _ in answers):
            tensors[kind] = _tensors(kind, [of_rank.get(kind, []) for of_rank, _ in answers])
    for name in tensors.get(OPTIMIZER, {}):
        if name in tensors.get(MODEL, {}):
            raise RuntimeError(f"tensor {name!r} is both a weight and a state")
    hosts = [host for _, host in answers]
    files = assign_files(tensors, hosts, file_bytes, min_file_bytes)
    queues = shares(tensors, files, len(hosts))
    share_bytes = [sum(segment.nbytes for segment in queue) for queue in queues]
    return Plan(list(tensors), files, share_bytes, rounds(queues, bucket_bytes, dist.rank()), hosts)


def _row(shard: Shard) -> Row:
    assert shard.data.dim() == 1, f"{shard.name}: a shard's data is 1-D, not {tuple(shard.data.shape)}"
    assert shard.data.is_contiguous(), f"{shard.name}: a shard's data is contiguous"
    spec, numel = TensorSpec(shard.name, tuple(shard.shape), shard.data.dtype), shard.data.numel()
    return Row(spec, shard.start, numel, (shard.replicated or shard.group is None) and numel == shard.total)


def _tensors(kind: str, rows: list[list[Row]]) -> dict[str, Tiled]:
    held: dict[str, list[tuple[Row, Piece]]] = {}
    for rank, of_rank in enumerate(rows):
        for index, row in enumerate(of_rank):
            piece = Piece(rank, index, row.start, row.start + row.numel)
            held.setdefault(row.spec.name, []).append((row, piece))
    tensors = {name: _tiled(name, found) for name, found in held.items()}
    if kind != OPTIMIZER:
        for name, tensor in tensors.items():
            if tensor.spec.dtype != torch.float32:
                raise RuntimeError(f"tensor {name!r}: weights are saved as fp32, not {tensor.spec.dtype}")
    return tensors


def _tiled(name: str, found: list[tuple[Row, Piece]]) -> Tiled:
    spec, first = found[0][0].spec, found[0][1].rank
    for row, piece in found:
        if row.spec != spec:
            raise RuntimeError(
                f"tensor {name!r} is {spec.dtype} {spec.shape} on rank {first} "
                f"and {row.spec.dtype} {row.spec.shape} on rank {piece.rank}"
            )
    if spec.dtype not in DTYPE_NAMES:
        raise RuntimeError(f"tensor {name!r}: checkpoints do not hold {spec.dtype}")
    whole = tuple(piece for row, piece in found if row.anywhere)
    if whole:
        return Tiled(spec, whole, anywhere=True)
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
    return Tiled(spec, tuple(pieces))


def share_of(plan: Plan, tensors: Tensors) -> Iterator[torch.Tensor]:
    """The bytes that this rank writes, in the order of its files, piece by piece; the other ranks' come in rounds.

    Collective: every rank must run it to its end. A piece is 1-D uint8, on the CPU or the device, part of a live shard
    or of the buffer, and good until the next one is asked for.

    Args:
        tensors: this rank's shards, as the plan was made of them.
    """
    me = dist.rank()
    # One buffer for what is sent and what is received, for all rounds: one bucket, whatever an allocator keeps.
    needed = max((this.buffer_bytes(me) for this in plan.rounds), default=0)
    buffer = torch.empty(needed, dtype=torch.uint8, device=_wire() if needed else None)
    for this in plan.rounds:
        received = _exchange(this, tensors, buffer) if this.travels else {}
        cursors = dict.fromkeys(received, 0)
        for segment in this.arrivals:
            if segment.source == me:
                yield _bytes(tensors, segment)
            else:
                begin = cursors[segment.source]
                cursors[segment.source] += segment.nbytes
                yield received[segment.source][begin : begin + segment.nbytes]


def _exchange(this: Round, tensors: Tensors, buffer: torch.Tensor) -> dict[int, torch.Tensor]:
    """Send and receive one round: the bytes from each rank that sends us some."""
    world, cursor = dist.world_size(), 0
    received = this.received(dist.rank())
    incoming = [received.get(rank, 0) for rank in range(world)]
    outgoing = []
    for rank in range(world):
        begin = cursor
        for segment in this.sends.get(rank, []):
            buffer[cursor : cursor + segment.nbytes].copy_(_bytes(tensors, segment))
            cursor += segment.nbytes
        outgoing.append(cursor - begin)
    into = buffer[cursor : cursor + sum(incoming)]
    torch_dist.all_to_all_single(into, buffer[:cursor], incoming, outgoing)
    return dict(enumerate(into.split(incoming)))


def _bytes(tensors: Tensors, segment: Segment) -> torch.Tensor:
    data = tensors[segment.kind][segment.shard].data.detach()
    return data.view(torch.uint8)[segment.start : segment.start + segment.nbytes]


def _wire() -> torch.device:
    """Where a tensor must lie to be sent: gloo sends from the CPU, the accelerators' libraries from the device."""
    return torch.device("cpu") if torch_dist.get_backend() == "gloo" else dist.device()
