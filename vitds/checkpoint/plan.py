"""Who writes which tensors, and which bytes travel in which round: pure functions, the same on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vitds.checkpoint.format import file_names
from vitds.checkpoint.tensorfile import TensorSpec, file_order


@dataclass(frozen=True, eq=False)
class Tiled:
    """A logical tensor and the pieces that tile it exactly once, in order; `anywhere`: each piece is all of it."""

    spec: TensorSpec
    pieces: npt.NDArray[np.int64]
    """(pieces, 4): the rank, the shard's number within its kind there, first element, one past the last. An array: a
    thousand ranks hold millions of pieces."""
    anywhere: bool = False

    def held(self) -> list[int]:
        """Elements by rank, up to the last rank that holds some."""
        rank, _, start, stop = self.pieces.T
        return [int(numel) for numel in np.bincount(rank, weights=stop - start)]


@dataclass(frozen=True)
class PlannedFile:
    """One file of a save, its tensors in the order of the file, and the rank that writes it."""

    kind: str
    name: str
    writer: int
    specs: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(spec.nbytes for spec in self.specs)


class Segment(NamedTuple):
    """`nbytes` bytes from byte `start` on of the `shard`-th shard of `kind` on rank `source`."""

    source: int
    kind: str
    shard: int
    start: int
    nbytes: int


@dataclass
class Round:
    """One rank's part of one exchange."""

    sends: dict[int, list[Segment]] = field(default_factory=dict)
    """What goes to each rank, in order."""
    arrivals: list[Segment] = field(default_factory=list)
    """How this rank's share goes on, in the order of its files: its own segments, and those that come."""
    travels: bool = False
    """Some rank sends: all must take part."""

    def received(self, me: int) -> dict[int, int]:
        """Bytes that come from each other rank."""
        received: dict[int, int] = {}
        for segment in self.arrivals:
            if segment.source != me:
                received[segment.source] = received.get(segment.source, 0) + segment.nbytes
        return received

    def buffer_bytes(self, me: int) -> int:
        """Bytes sent and received together."""
        sent = sum(segment.nbytes for segments in self.sends.values() for segment in segments)
        return sent + sum(self.received(me).values())


@dataclass
class _Slot:
    """A file that is being filled."""

    kind: str
    writer: int
    number: int
    nbytes: int = 0
    specs: list[TensorSpec] = field(default_factory=list)


def assign_files(
    tensors: Mapping[str, Mapping[str, Tiled]], hosts: Sequence[str], file_bytes: int, min_file_bytes: int
) -> list[PlannedFile]:
    """Tensors to files and files to ranks, so that every rank writes about the same number of bytes.

    No more files than keep each within `file_bytes`, but one a rank where they are not smaller than `min_file_bytes`
    then. A tensor larger than `file_bytes` has a file to itself.

    Args:
        tensors: by kind and name, with their holders.
        hosts: of each rank; where there are fewer files than ranks, the writers are spread over them.
    """
    world = len(hosts)
    counts = {}
    for kind, of_kind in tensors.items():
        total = sum(tensor.spec.nbytes for tensor in of_kind.values())
        counts[kind] = max(1, -(-total // file_bytes), min(world, -(-total // min_file_bytes)))
    writers = sorted(range(world), key=lambda rank: (list(hosts[:rank]).count(hosts[rank]), rank))
    while True:
        slots, lacking = _fill(tensors, counts, writers, file_bytes)
        if lacking is None:
            break
        counts[lacking] += 1
    files = []
    for kind in tensors:
        used = [slot for slot in slots if slot.kind == kind and slot.specs]
        for name, slot in zip(file_names(kind, len(used)), used, strict=True):
            files.append(PlannedFile(kind, name, slot.writer, tuple(file_order(slot.specs))))
    return files


def _fill(
    tensors: Mapping[str, Mapping[str, Tiled]], counts: dict[str, int], writers: list[int], file_bytes: int
) -> tuple[list[_Slot], str | None]:
    """The filled files; or the kind that needs one more, because its files have no room for a tensor.

    Largest tensors first, each to the rank that holds most of it while neither the rank's part of all bytes nor the
    file's part of its kind is passed, else to the rank with the least. Kinds with the fewest files first: those with
    more can level what they leave.
    """
    order = (writers[i % len(writers)] for i in range(sum(counts.values())))
    slots = [_Slot(kind, next(order), number) for kind in tensors for number in range(counts[kind])]
    load = dict.fromkeys(writers, 0)
    totals = {kind: sum(tensor.spec.nbytes for tensor in of_kind.values()) for kind, of_kind in tensors.items()}
    part = -(-sum(totals.values()) // len(writers))
    for kind in sorted(tensors, key=lambda kind: counts[kind]):
        own = [slot for slot in slots if slot.kind == kind]
        for tensor in sorted(tensors[kind].values(), key=lambda tensor: (-tensor.spec.nbytes, tensor.spec.name)):
            size, held = tensor.spec.nbytes, dict(enumerate(tensor.held()))
            with_room = [slot for slot in own if not slot.specs or slot.nbytes + size <= file_bytes]
            if not with_room:
                return [], kind
            file_part = -(-totals[kind] // counts[kind])
            at_home = {
                slot.number: held.get(slot.writer, 0)
                for slot in with_room
                if load[slot.writer] + size <= part and slot.nbytes + size <= file_part
            }
            best = min(
                with_room,
                key=lambda slot: (-at_home.get(slot.number, -1), load[slot.writer], slot.nbytes, slot.number),
            )
            best.specs.append(tensor.spec)
            best.nbytes += size
            load[best.writer] += size
    return slots, None


def shares(
    tensors: Mapping[str, Mapping[str, Tiled]], files: Sequence[PlannedFile], world: int
) -> list[Iterator[Segment]]:
    """What each rank writes, as segments in the order of its files, made as they are asked for."""
    own: list[list[PlannedFile]] = [[] for _ in range(world)]
    for file in files:
        own[file.writer].append(file)
    return [_segments(tensors, of_rank) for of_rank in own]


def _segments(tensors: Mapping[str, Mapping[str, Tiled]], files: Sequence[PlannedFile]) -> Iterator[Segment]:
    for file in files:
        for spec in file.specs:
            tensor = tensors[file.kind][spec.name]
            pieces = tensor.pieces.tolist()
            if tensor.anywhere:
                own = [piece for piece in pieces if piece[0] == file.writer]
                pieces = own[:1] or [pieces[file.writer % len(pieces)]]
            for rank, shard, start, stop in pieces:
                if stop > start:
                    yield Segment(rank, file.kind, shard, 0, (stop - start) * spec.dtype.itemsize)


def rounds(queues: Sequence[Iterable[Segment]], bucket_bytes: int, me: int) -> list[Round]:
    """The exchanges that bring every rank its share, in order, as rank `me` sees them.

    In each, what a rank sends and what it receives are together at most `bucket_bytes`; a writer's own segments do not
    travel and do not count. Within a round the writers take turns at small portions, so that a rank that holds what
    many want feeds them alike.
    """
    world = len(queues)
    rest, done = [iter(queue) for queue in queues], [0] * world
    heads = [next(of_writer, None) for of_writer in rest]
    portion = max(1, bucket_bytes // (2 * world))
    found: list[Round] = []
    while any(head is not None for head in heads):
        this, room, moved = Round(), [bucket_bytes] * world, True
        while moved:
            moved = False
            for turn in range(world):
                writer = (turn + len(found)) % world
                left = portion
                while (segment := heads[writer]) is not None:
                    nbytes = segment.nbytes - done[writer]
                    if segment.source != writer:
                        nbytes = min(nbytes, left, room[writer], room[segment.source])
                        if nbytes == 0:
                            break
                        room[writer] -= nbytes
                        room[segment.source] -= nbytes
                        left -= nbytes
                        moved = this.travels = True
                    if me in (writer, segment.source):
                        part = segment._replace(start=segment.start + done[writer], nbytes=nbytes)
                        _extend(this.arrivals if writer == me else this.sends.setdefault(writer, []), part)
                    done[writer] += nbytes
                    if done[writer] == segment.nbytes:
                        heads[writer], done[writer] = next(rest[writer], None), 0
        found.append(this)
    return found


def _extend(segments: list[Segment], part: Segment) -> None:
    """Append, or lengthen the last one that `part` continues."""
    last = segments[-1] if segments else None
    if last is not None and last[:3] == part[:3] and last.start + last.nbytes == part.start:
        segments[-1] = last._replace(nbytes=last.nbytes + part.nbytes)
    else:
        segments.append(part)
