"""Who writes what, and which bytes travel when: pure functions, tried on every ownership we can think of."""

from __future__ import annotations

import itertools
import pickle
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from vitds import dist
from vitds.checkpoint.gather import Plan, agree_on_plan, rows_of
from vitds.checkpoint.plan import PlannedFile, Segment, Tiled, assign_files, rounds, shares
from vitds.checkpoint.tensorfile import TensorSpec
from vitds.layout import Shard


def tensors_of(sizes: list[int], cuts: dict[str, list[int]] | None = None) -> dict[str, Tiled]:
    """Tensors of so many fp32 elements; `cuts` gives each rank's number of elements, else rank 0 holds all."""
    found = {}
    for i, size in enumerate(sizes):
        name, cursor, pieces = f"t{i}", 0, []
        for rank, numel in enumerate((cuts or {}).get(name, [size])):
            if numel:
                pieces.append((rank, i, cursor, cursor + numel))
            cursor += numel
        found[name] = Tiled(TensorSpec(name, (size,), torch.float32), table(pieces))
    return found


def table(pieces: list[tuple[int, int, int, int]]) -> npt.NDArray[np.int64]:
    return np.array(pieces, dtype=np.int64).reshape(-1, 4)


def load_of(files: list[PlannedFile], world: int) -> list[int]:
    return [sum(file.nbytes for file in files if file.writer == rank) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_bytes_are_balanced_over_the_writers(world: int) -> None:
    draw = random.Random(world)
    model = [draw.choice([10, 500, 2000, 6000]) for _ in range(150)]
    tensors = {"model": tensors_of(model), "optimizer": tensors_of([*model, *[1] * 150])}
    files = assign_files(tensors, ["host"] * world, 10**9, 1)
    load = load_of(files, world)
    assert len(files) == 2 * world
    assert max(load) - min(load) <= 2000, load  # rank 0 holds everything, and gets no more for it
    assert assign_files({k: dict(reversed(t.items())) for k, t in tensors.items()}, ["host"] * world, 10**9, 1) == files
    names = [(file.kind, spec.name) for file in files for spec in file.specs]
    assert sorted(names) == sorted((kind, name) for kind, of_kind in tensors.items() for name in of_kind)


def test_a_kind_in_few_files_is_levelled_by_the_others() -> None:
    """400 bytes of weights, cut in two; 200 of state in one file: each of two ranks writes 300."""
    tensors = {"model": tensors_of([5] * 20), "optimizer": tensors_of([5] * 10)}
    files = assign_files(tensors, ["host"] * 2, 10**9, 210)
    assert [file.kind for file in files] == ["model", "model", "optimizer"]
    assert load_of(files, 2) == [300, 300]


def test_a_tensor_is_written_where_it_lies_when_that_costs_no_balance() -> None:
    """ZeRO-1 and 2: each rank holds a stretch of the parameters, and only what a cut divides travels."""
    world, sizes = 4, [100] * 40
    cuts = {f"t{i}": [100 if i // 10 == rank else 0 for rank in range(world)] for i in range(40)}
    tensors = {"model": tensors_of(sizes, cuts), "optimizer": tensors_of(sizes, cuts)}
    files = assign_files(tensors, ["host"] * world, 10**9, 1)
    assert load_of(files, world) == [8000] * world
    queues = [list(queue) for queue in shares(tensors, files, world)]
    assert all(segment.source == rank for rank, queue in enumerate(queues) for segment in queue)
    assert not any(this.travels for this in rounds(queues, 100, 0))


def test_writers_are_spread_over_hosts() -> None:
    files = assign_files({"model": tensors_of([100] * 9)}, ["a", "a", "b", "b"], 10**9, 1800)
    assert [file.writer for file in files] == [0, 2]


def test_file_sizes_and_names() -> None:
    tensors = {"model": tensors_of([30, 30, 30, 71, 1]), "optimizer": {}, "model.ema": tensors_of([3])}
    files = assign_files(tensors, ["host"], 280, 10**9)
    assert {file.name: [spec.name for spec in file.specs] for file in files} == {
        "model-00001-of-00003.safetensors": ["t3"],  # 284 bytes: a file to itself
        "model-00002-of-00003.safetensors": ["t0", "t2"],
        "model-00003-of-00003.safetensors": ["t1", "t4"],
        "model.ema.safetensors": ["t0"],
    }
    tight = assign_files({"model": tensors_of([39, 39, 39, 39, 39, 1])}, ["host"], 280, 10**9)
    assert max(file.nbytes for file in tight) <= 280
    assert len(tight) == 5  # 3 would hold the bytes, but no two of the tensors fit one file
    assert [file.name for file in assign_files({"optimizer": tensors_of([3])}, ["host"], 280, 1)] == [
        "optimizer-00001-of-00001.safetensors"
    ]


def test_a_whole_tensor_that_its_writer_has_does_not_travel() -> None:
    spec = TensorSpec("row", (50,), torch.float32)
    tensors = {"optimizer": {"row": Tiled(spec, table([(rank, 7, 0, 50) for rank in (1, 2)]), anywhere=True)}}
    for writer, source in ((0, 1), (1, 1), (2, 2)):
        queues = shares(tensors, [PlannedFile("optimizer", "o", writer, (spec,))], 3)
        assert list(queues[writer]) == [Segment(source, "optimizer", 7, 0, 200)]


OWNERSHIPS = {
    "one rank holds everything": lambda draw, world, total: [0] * (world - 1) + [total],
    "one element each": lambda draw, world, total: [1] * (world - 1) + [total - world + 1],
    "equal": lambda draw, world, total: [total // world] * (world - 1) + [total - total // world * (world - 1)],
    "ragged": lambda draw, world, total: [
        b - a
        for cuts in [[0, *sorted(draw.randint(0, total) for _ in range(world - 1)), total]]
        for a, b in itertools.pairwise(cuts)
    ],
}


@pytest.mark.parametrize("bucket", [1, 7, 64, 10**6])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("ownership", OWNERSHIPS)
def test_rounds_bring_each_rank_its_share_in_order_through_a_bounded_buffer(
    ownership: str, world: int, bucket: int
) -> None:
    draw = random.Random(f"{ownership} {world}")
    sizes = [draw.choice([world, 13, 40]) for _ in range(9)]
    cuts = {f"t{i}": OWNERSHIPS[ownership](draw, world, size) for i, size in enumerate(sizes)}
    tensors = {"model": tensors_of(sizes, cuts)}
    files = assign_files(tensors, ["host"] * world, 10**9, 1)
    queues = [list(queue) for queue in shares(tensors, files, world)]
    plans = [rounds(queues, bucket, me) for me in range(world)]
    assert len({len(plan) for plan in plans}) == 1
    arrived: list[list[tuple[int, int, int]]] = [[] for _ in range(world)]
    for number in range(len(plans[0])):
        this = [plan[number] for plan in plans]
        assert len({one.travels for one in this}) == 1
        for me in range(world):
            assert this[me].buffer_bytes(me) <= bucket
            assert me not in this[me].sends
            received = this[me].received(me)
            for source in set(range(world)) - {me}:
                sent = this[source].sends.get(me, [])
                expected = [segment for segment in this[me].arrivals if segment.source == source]
                assert singly(sent) == singly(expected)
                assert received.get(source, 0) == sum(segment.nbytes for segment in sent)
                assert not sent or this[me].travels
            arrived[me] += singly(this[me].arrivals)
    assert arrived == [singly(queue) for queue in queues]


def singly(segments: list[Segment]) -> list[tuple[int, int, int]]:
    """Each byte: (source, shard, position)."""
    return [(s.source, s.shard, s.start + i) for s in segments for i in range(s.nbytes)]


def test_all_writers_are_fed_in_each_round() -> None:
    """Rank 0 holds all; the others' shares arrive side by side, not one after another."""
    queues = [[Segment(0, "model", rank, 0, 3000)] for rank in range(4)]
    received = [[sum(this.received(me).values()) for this in rounds(queues, 600, me)] for me in (1, 2, 3)]
    assert len(received[0]) == 9000 // 600
    assert all(150 <= nbytes <= 250 for of_rank in received for nbytes in of_rank[:-2]), received


class World:
    """Ranks as threads that agree by the words of `vitds.dist`; `sent` keeps the bytes that each rank has sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
        self.size, self.local, self.sent = size, threading.local(), [0] * size
        self.barrier, self.box = threading.Barrier(size), [b""] * size
        monkeypatch.setattr(dist, "rank", lambda: self.local.rank)
        monkeypatch.setattr(dist, "all_objects", self.all_objects)
        monkeypatch.setattr(dist, "broadcast_object", self.broadcast_object)

    def run(self, tensors: list[dict[str, list[Shard]]]) -> list[Plan | str]:
        """Each rank's plan of what each holds, or why it has none."""

        def one(rank: int) -> Plan | str:
            self.local.rank = rank
            try:
                return agree_on_plan(rows_of(tensors[rank]), 1000, 10**6, 100)
            except RuntimeError as error:
                return str(error)

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(one, range(self.size)))

    def all_objects(self, value: Any) -> list[Any]:
        self.box[self.local.rank] = pickle.dumps(value)
        self.sent[self.local.rank] += len(self.box[self.local.rank])
        self.barrier.wait(10)
        answers = [pickle.loads(sent) for sent in self.box]
        self.barrier.wait(10)
        return answers

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        return self.all_objects(value if self.local.rank == source else None)[source]


def cut(name: str, rank: int, world: int, shape: tuple[int, ...] = (32, 5)) -> Shard:
    """A rank's part of a tensor that is cut evenly."""
    part = shape[0] * shape[1] // world
    return Shard(name, shape, torch.zeros(part), rank * part, "group")


def test_a_rank_sends_numbers_for_what_rank_0_has_named(monkeypatch: pytest.MonkeyPatch) -> None:
    world, count = 8, 200
    names = [f"encoder.blocks.{i}.attention.projection.weight" for i in range(count)]
    tensors = [
        {
            "model": [cut(name, rank, world) for name in names],
            "optimizer": [cut("late", rank, world)] if rank > 2 else [],  # three ranks have not heard of it
        }
        for rank in range(world)
    ]
    for rank in range(3):
        tensors[3]["optimizer"].append(Shard("late", (32, 5), torch.zeros(20), rank * 20, "group"))
    ranks = World(monkeypatch, world)
    plans = ranks.run(tensors)
    assert all(isinstance(plan, Plan) for plan in plans), plans
    assert max(ranks.sent[1:]) <= 6 * 8 * (count + 4) + 500
    assert all(plan.files == plans[0].files and plan.share_bytes == plans[0].share_bytes for plan in plans)
    assert sum(plans[0].share_bytes) == (count + 1) * 160 * 4
    assert any(spec.name == "late" for file in plans[0].files for spec in file.specs)


@pytest.mark.parametrize(
    ("rank", "given", "reason"),
    [
        (2, ("w", (16, 10)), r"tensor 'w' is torch.float32 \(32, 5\) on rank 0 and torch.float32 \(16, 10\) on rank 2"),
        (1, ("w", (64, 5)), r"tensor 'w' is .* on rank 0 and .*\(64, 5\) on rank 1"),
        (3, ("m", (32, 5)), "tensor 'm': no rank holds its elements \\[0, 120\\)"),
    ],
)
def test_what_one_rank_says_otherwise_is_refused_by_all(
    monkeypatch: pytest.MonkeyPatch, rank: int, given: tuple[str, tuple[int, int]], reason: str
) -> None:
    tensors = [{"model": [cut("w", one, 4)]} for one in range(4)]
    tensors[rank]["model"] += [cut(given[0], rank, 4, given[1])]
    found = World(monkeypatch, 4).run(tensors)
    assert len(set(map(str, found))) == 1
    assert re.fullmatch(reason, str(found[0])), found[0]
