"""What the ranks hold, agreed upon, and its way to the ranks that write it.

Metadata travels once; after it every rank knows who holds which elements of what and computes the same plan. Data
travels in rounds of one all-to-all each, through one buffer: no rank ever holds a whole tensor for this.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as torch_dist

from vitds import dist
from vitds.checkpoint.format import EMA, MODEL, OPTIMIZER
from vitds.checkpoint.plan import PlannedFile, Round, Segment, Tiled, assign_files, rounds, shares
from vitds.checkpoint.share import reason_of
from vitds.checkpoint.tensorfile import DTYPE_NAMES, TensorSpec
from vitds.errors import Stopped
from vitds.layout import Shard

Tensors = Mapping[str, list[Shard]]
"""Shards of one rank, by kind."""


Name = tuple[str, TensorSpec]
"""A tensor of a kind."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Everything about one rank's shards that a plan depends on."""

    kinds: list[str]
    names: list[Name]
    """Of each shard."""
    places: npt.NDArray[np.int64]
    """(shards, 4): the shard's number within its kind, first element, one past the last, and whether it is a whole
    tensor that any of its holders may give."""

    def __eq__(self, other: object) -> bool:
        """The same plan suits both."""
        return (
            isinstance(other, Rows)
            and (self.kinds, self.names) == (other.kinds, other.names)
            and np.array_equal(self.places, other.places)
        )


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
    def bucket_bytes(self) -> int:
        """What this rank sends and receives at once, at most."""
        return max((this.buffer_bytes(dist.rank()) for this in self.rounds), default=0)

    @property
    def own_files(self) -> list[PlannedFile]:
        """The files that this rank writes, in the order in which its share arrives."""
        return [file for file in self.files if file.writer == dist.rank()]


def rows_of(tensors: Tensors) -> Rows:
    """What this rank has to say of its shards."""
    names: list[Name] = []
    places: list[tuple[int, int, int, bool]] = []
    for kind, shards in tensors.items():
        for number, shard in enumerate(shards):
            assert shard.data.dim() == 1, f"{shard.name}: a shard's data is 1-D, not {tuple(shard.data.shape)}"
            assert shard.data.is_contiguous(), f"{shard.name}: a shard's data is contiguous"
            names.append((kind, TensorSpec(shard.name, tuple(shard.shape), shard.data.dtype)))
            numel = shard.data.numel()
            anywhere = (shard.replicated or shard.group is None) and numel == shard.total
            places.append((number, shard.start, shard.start + numel, anywhere))
    return Rows(list(tensors), names, np.array(places, dtype=np.int64).reshape(-1, 4))


def agree_on_plan(rows: Rows, bucket_bytes: int, file_bytes: int, min_file_bytes: int) -> Plan:
    """The plan of all ranks' rows. Collective.

    A tensor that is replicated, or in no group, is taken whole from one rank, its writer where that has it; every
    other must be tiled by its shards.

    Names, shapes and dtypes travel once, from rank 0, for nearly always it has heard of every tensor; then each rank
    sends what it alone knows, and numbers.

    Raises:
        RuntimeError: on all ranks, naming the tensor: an element that no rank or more than one holds, ranks that
            disagree on a shape or dtype, weights that are neither fp32 nor bf16, a dtype that checkpoints do not know.
    """
    known: list[Name] = dist.broadcast_object(list(dict.fromkeys(rows.names)))
    heard = set(known)
    news = list(dict.fromkeys(name for name in rows.names if name not in heard))
    answers: list[tuple[list[str], list[Name], str]] = dist.all_objects((rows.kinds, news, socket.gethostname()))
    hosts = [host for _, _, host in answers]
    kinds = [kind for kind in (MODEL, OPTIMIZER, EMA) if any(kind in of_rank for of_rank, _, _ in answers)]
    numbers = _numbered([known, *(news for _, news, _ in answers)])
    pieces = _all_pieces(rows, numbers)
    tensors: dict[str, dict[str, Tiled]] = {kind: {} for kind in kinds}
    for (kind, spec), tensor in zip(numbers, _tiled(list(numbers), pieces), strict=True):
        tensors[kind][spec.name] = tensor
    files = assign_files(tensors, hosts, file_bytes, min_file_bytes)
    share_bytes = [0] * len(hosts)
    for file in files:
        share_bytes[file.writer] += file.nbytes
    own = rounds(shares(tensors, files, len(hosts)), bucket_bytes, dist.rank())
    return Plan(kinds, files, share_bytes, own, hosts)


def _numbered(lists: list[list[Name]]) -> dict[Name, int]:
    """All tensors that some rank knows, numbered, and what is wrong with them: rank 0's list, then each rank's news."""
    first: dict[tuple[str, str], tuple[int, TensorSpec]] = {}
    numbers: dict[Name, int] = {}
    for i, names in enumerate(lists):
        rank = max(0, i - 1)
        for kind, spec in names:
            where, before = first.setdefault((kind, spec.name), (rank, spec))
            if spec != before:
                raise RuntimeError(
                    f"tensor {spec.name!r} is {before.dtype} {before.shape} on rank {where} "
                    f"and {spec.dtype} {spec.shape} on rank {rank}"
                )
            if spec.dtype not in DTYPE_NAMES:
                raise RuntimeError(f"tensor {spec.name!r}: checkpoints do not hold {spec.dtype}")
            if kind != OPTIMIZER and spec.dtype not in (torch.float32, torch.bfloat16):
                raise RuntimeError(f"tensor {spec.name!r}: weights are saved as fp32 or bf16, not {spec.dtype}")
            if ({MODEL: OPTIMIZER, OPTIMIZER: MODEL}.get(kind), spec.name) in first:
                raise RuntimeError(f"tensor {spec.name!r} is both a weight and a state")
            numbers.setdefault((kind, spec), len(numbers))
    return numbers


def _all_pieces(rows: Rows, numbers: dict[Name, int]) -> npt.NDArray[np.int64]:
    """The pieces of all ranks (pieces, 6), sorted by tensor and first element: the tensor's number, the rank, and its
    place there. Collective. Shards without elements are left out."""
    own = np.empty((len(rows.names), 6), dtype=np.int64)
    own[:, 0] = [numbers[name] for name in rows.names]
    own[:, 1] = dist.rank()
    own[:, 2:] = rows.places
    own = own[own[:, 4] > own[:, 3]]
    pieces = np.concatenate(dist.all_objects(own))
    return pieces[np.lexsort((pieces[:, 3], pieces[:, 0]))]


def _tiled(names: list[Name], pieces: npt.NDArray[np.int64]) -> Iterator[Tiled]:
    """Each tensor with its pieces, if they tile it."""
    bounds = np.searchsorted(pieces[:, 0], np.arange(len(names) + 1)).tolist()
    for (_, spec), begin, end in zip(names, bounds, bounds[1:], strict=False):
        own = pieces[begin:end]
        whole = own[:, 5] == 1
        if whole.any():
            yield Tiled(spec, own[whole, 1:5], anywhere=True)
            continue
        ends = np.concatenate([[0], own[:, 4]])
        starts = np.concatenate([own[:, 3], [spec.numel]])
        wrong = np.flatnonzero(starts != ends)
        if len(wrong):
            _refuse(spec, own, int(wrong[0]))
        yield Tiled(spec, own[:, 1:5])


def _refuse(spec: TensorSpec, pieces: Any, at: int) -> None:
    """Say what is wrong where the `at`-th piece, or the end, does not follow on the piece before it."""
    cursor = int(pieces[at - 1, 4]) if at else 0
    if at == len(pieces):
        raise RuntimeError(
            f"tensor {spec.name!r}: no rank holds its elements [{cursor}, {spec.numel}), or it has not so many"
        )
    start, rank = int(pieces[at, 3]), int(pieces[at, 1])
    if start > cursor:
        raise RuntimeError(f"tensor {spec.name!r}: no rank holds its elements [{cursor}, {start})")
    raise RuntimeError(
        f"tensor {spec.name!r}: ranks {int(pieces[at - 1, 1])} and {rank} both hold its elements from {start} on"
    )


def bucket_for(plan: Plan) -> torch.Tensor:
    """Room for what this rank sends and receives in the largest round, together: 1-D uint8, where it can be sent from.

    Raises:
        MemoryError: it cannot be had.
    """
    nbytes, device = plan.bucket_bytes, wire()
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        raise MemoryError(
            f"no room on {device} for a bucket of {nbytes / 1e6:,.1f} MB to send and receive with: {error}"
        ) from error


def share_of(plan: Plan, tensors: Tensors, bucket: torch.Tensor) -> Iterator[torch.Tensor]:
    """The bytes that this rank writes, in the order of its files, piece by piece; the other ranks' come in rounds.

    Collective: every rank must run it to its end. A piece is 1-D uint8, on the CPU or the device, part of a live shard
    or of the bucket, and good until the next one is asked for.

    Args:
        tensors: this rank's shards, as the plan was made of them.
        bucket: from `bucket_for`; the caller's, so that all ranks have theirs before the first is waited for.
    """
    me = dist.rank()
    for this in plan.rounds:
        received = _exchange(this, tensors, bucket) if this.travels else {}
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


def wire() -> torch.device:
    """Where a tensor must lie to be sent: gloo sends from the CPU, the accelerators' libraries from the device."""
    alone = not torch_dist.is_initialized()
    return torch.device("cpu") if alone or torch_dist.get_backend() == "gloo" else dist.device()


def together(action: Callable[[], None], ranks: Collection[int] | None = None) -> None:
    """`dist.together` on all ranks or only on these; whatever fails is Stopped, in one line (`reason_of`). Collective."""

    def act() -> None:
        if ranks is not None and dist.rank() not in ranks:
            return
        try:
            action()
        except Exception as error:
            where = f"rank {dist.rank()} on {socket.gethostname()}: " if dist.world_size() > 1 else ""
            raise Stopped(f"{where}{reason_of(error)}") from error

    dist.together(act)


def named(rank: int, hosts: list[str]) -> str:
    """Whose trouble it is; nothing in a world of one."""
    return f"rank {rank} on {hosts[rank]}: " if len(hosts) > 1 else ""
