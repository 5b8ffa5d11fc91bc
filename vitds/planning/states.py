"""Bytes of what training keeps between micro batches and steps, and of what it needs beside it for a while, by ZeRO stage.

DeepSpeed 0.19.8's rules, read in its sources and held against the storages of real engines (tests/planning/test_memory.py).
Ψ trained parameters, of which a rank holds Ψ/n (S, padded) and I when those are counted whole of which it has a part; e bytes a
number of the model's precision, a of the sums over micro batches, c of what is sent, 4 of a master; R elements of the fullest
bucket, B of the buffer for one, F of a flat's share.

    weights     e·Ψ, at stage 3 e·S and what is gathered (vitds.planning.gathers), each gather once more while it comes in
    masters     4·S, at stage 0 4·Ψ; none where fp32 is stepped in place
    gradients   0               e·Ψ; in 16 bits 4·Ψ more in the step
                1               e·Ψ (a·Ψ in fp16), of which a·S is left when they are reduced, a·F more meanwhile
                1, BF16_Optim.  4·Ψ always
                2               a·S
                3               a·S always
                1, 2 and 3      where a ≠ 4, and always at 3: 4·F in the step, for the flat that is stepped
    buckets     0: of 5e8 elements, e and c bytes each; BF16_Optimizer: 4·B and c·B; 1 and 2: e·B while gradients come, two with
                overlap_comm, and (e + c)·R while one is reduced; 3: c·B always, and (c + c)·R

(c does not count twice where it is e.) Of this DeepSpeed alone would need more: see vitds/zero/lean.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from vitds.planning.communication import ENGINE_BUCKET, buckets_of, persistent_of
from vitds.planning.gathers import Settings, most_whole
from vitds.planning.job import Job, block_of
from vitds.planning.optimizer_state import scratch_bytes, state_bytes
from vitds.planning.shares import FlatShare, flat_shares, master_bytes, sum_bytes
from vitds.planning.workload import Workload

LOSS, BACKWARD, REDUCE, STEP, EVALUATION, SAVING = ("loss", "backward", "reduction", "step", "evaluation", "saving")
MOMENTS = (LOSS, BACKWARD, REDUCE, STEP, EVALUATION, SAVING)
SAVE_BUCKET = 512 * 2**20
"""vitds.checkpoint.save.Saver's bucket_bytes, which lies on the device that ranks send from."""


@dataclass(frozen=True)
class Part:
    """Bytes of one kind, and the moments of a step at which they are there."""

    kind: str
    what: str
    bytes: int
    when: tuple[str, ...] = MOMENTS


@dataclass
class States:
    """Everything that is no activation, on the rank that holds most; the same for any size of micro batch, whether there is
    one in a step or more."""

    workload: Workload
    ranks: int
    flats: list[FlatShare] = field(init=False)
    sizes: dict[str, int] = field(init=False)
    names: frozenset[str] = field(init=False)
    buckets: list[list[str]] = field(init=False)
    """Gradients that are reduced together, in the order in which they come."""
    bucket: int = field(init=False)
    """B: elements of a bucket."""
    blocks: dict[str, int] = field(init=False)
    """The block that a parameter is in."""

    def __post_init__(self) -> None:
        job, self.sizes, self.names = self.job, self.job.sizes, self.job.names
        sizes, names = self.sizes, self.names
        self.flats = flat_shares(job, self.ranks)
        trained = [name for name in reversed(list(sizes)) if name in names]
        self.bucket = int(job.zero.get("reduce_bucket_size", 5e8))
        self.buckets = buckets_of(trained, sizes, self.bucket)
        depth = self.workload.model.depth
        self.blocks = {name: block_of(name, depth) for name in sizes}
        self._known: dict[tuple[int, bool] | None, list[Part]] = {}

    @property
    def job(self) -> Job:
        """What ranks share."""
        return self.workload.job

    def steady(self) -> list[Part]:
        """What does not depend on how far a backward pass has come."""
        if None not in self._known:
            self._known[None] = [part for part in self._steady() if part.bytes]
        return list(self._known[None])

    def during(self, block: int, in_attention: bool) -> list[Part]:
        """What a backward pass has of gradients while it is in a block's MLP, or its attention: those of all later blocks."""
        if (block, in_attention) not in self._known:
            found = [part for part in self._during(block, in_attention) if part.bytes]
            self._known[block, in_attention] = found
        return list(self._known[block, in_attention])

    def _steady(self) -> Iterator[Part]:
        workload, job, e = self.workload, self.job, self.workload.precision_bytes
        share, master, sums, sent = self.share, master_bytes(job), sum_bytes(job), job.gradient_bytes
        yield from self._weights()
        if job.stage or job.half:
            yield Part("masters", "16 bits" if master == 2 else "fp32", master * share)
        if workload.device == "cpu":  # beside other devices they are in the host's memory
            yield Part("masters", "of what is frozen", self.frozen_bytes)
        yield Part("optimizer state", workload.optimizer, state_bytes(job, self.ranks))
        if workload.ema:
            yield Part("average", "fp32", 4 * share)
        largest = max((flat.share for flat in self.flats), default=0)
        converted = bool(job.stage) and sums != master and not job.whole_gradients
        scratch = scratch_bytes(job, self.ranks, workload.device)  # by then the sums that were converted have gone
        yield Part("optimizer state", "scratch", max(0, scratch - (sums * largest if converted else 0)), (STEP,))
        again = (
            () if workload.accumulation == 1 else (LOSS,)
        )  # in a later micro batch's passes what was added up is there
        if job.whole_gradients:  # BF16_Optimizer
            whole = sum(flat.elements for flat in self.flats)
            yield Part("gradients", "fp32, whole", 4 * whole)
            yield Part("buckets", "reduced", min(self.bucket, whole) * (4 + (sent if sent != 4 else 0)), (REDUCE,))
        elif job.stage == 0:
            yield Part("gradients", "", job.trained * e, (*again, REDUCE, STEP))
            yield Part("gradients", "fp32", job.trained * master if job.half else 0, (STEP,))
            reduced = _engine_bucket([size for name, size in self.sizes.items() if name in self.names])
            yield Part("buckets", "reduced", reduced * (e + (sent if sent != e else 0)), (REDUCE,))
        elif job.stage == 1:
            staged = max(e, sums)
            yield Part("gradients", "", job.trained * staged, (*again, REDUCE))
            filled = sum(self._largest_of_groups()) if job.zero.get("overlap_comm") else largest
            yield Part("gradients", "of the flats that they are added into", sums * filled, (REDUCE,))
            yield Part("gradients", "this rank's part", sums * share, (STEP,))
            yield Part("buckets", "buffer", self._buffer(staged), (*again, REDUCE))
            yield Part("buckets", "reduced", self._reduced(staged), (REDUCE,))
        elif job.stage == 2:
            yield Part("gradients", "this rank's part", sums * share, (*again, REDUCE, STEP))
            yield Part("gradients", "larger than a bucket", e * self._large(-1), (REDUCE,))
            yield Part("buckets", "buffer", self._buffer(e), (REDUCE,))
            yield Part("buckets", "reduced", self._reduced(e), (REDUCE,))
        else:
            yield Part("gradients", "this rank's part", sums * share)
            yield Part("gradients", "of the flat that is stepped", sums * largest, (STEP,))
            yield Part("buckets", "buffer", self._buffer(sent))
            yield Part("buckets", "reduced", self._scattered(), (REDUCE,))
        if converted:
            yield Part("gradients", f"of the flat that is stepped, in {8 * master} bits", master * largest, (STEP,))
        if workload.device == "cuda" and self.ranks > 1:
            yield Part("buckets", "of a checkpoint", min(SAVE_BUCKET, 2 * master * share), (SAVING,))

    def _during(self, block: int, in_attention: bool) -> Iterator[Part]:
        job, e, sums, when = self.job, self.workload.precision_bytes, sum_bytes(self.job), (BACKWARD,)
        sizes, summed = self.sizes, self.workload.accumulation > 1
        came = [name for bucket in self.buckets for name in bucket if self.blocks[name] > block]
        # A bucket goes off when a gradient comes that it has no room for.
        own = f"blocks.{block}." if in_attention else f"blocks.{block}.mlp.fc2"
        gone = [
            bucket
            for bucket, following in zip(self.buckets, self.buckets[1:], strict=False)
            if self.blocks[following[0]] > block or following[0].startswith(own)
        ]
        yield Part("gradients", "the largest on its way", e * self._largest, when)
        if job.stage == 0:
            yield Part("gradients", "", e * (job.trained if summed else sum(sizes[name] for name in came)), when)
        elif job.whole_gradients:
            yield Part("gradients", "the largest, in fp32", 4 * self._largest, when)
        elif job.stage == 1:
            staged = max(e, sums)
            yield Part("gradients", "", staged * (job.trained if summed else sum(sizes[name] for name in came)), when)
            yield Part("buckets", "buffer", self._buffer(staged), when)
            yield Part(
                "buckets", "reduced", self._reduced(staged) if gone and job.zero.get("overlap_comm") else 0, when
            )
        elif job.stage == 2:
            touched = {name for bucket in gone for name in bucket}
            flats = [flat for flat in self.flats if summed or touched.intersection(flat.names)]
            yield Part("gradients", "this rank's part", sums * sum(flat.share for flat in flats), when)
            yield Part("gradients", "larger than a bucket", e * self._large(block), when)
            yield Part("buckets", "buffer", self._buffer(e), when)
            yield Part("buckets", "reduced", self._reduced(e) if gone else 0, when)
        elif job.stage == 3:
            yield Part("buckets", "reduced", self._scattered() if gone else 0, when)

    def _weights(self) -> Iterator[Part]:
        job, e, sizes = self.job, self.workload.precision_bytes, self.sizes
        if job.stage < 3:
            padding = sum(flat.elements for flat in self.flats) - job.trained if job.stage else 0
            yield Part("weights", "", (sum(sizes.values()) + padding) * e)
            return
        yield Part("weights", "this rank's part", e * sum(math.ceil(size / self.ranks) for size in sizes.values()))
        if job.hpz > 1:
            yield Part("weights", "second copy (hpZ)", e * sum(math.ceil(size / job.hpz) for size in sizes.values()))
        if self.ranks > 1:
            persistent, zero = persistent_of(job), job.zero
            settings = Settings(
                int(zero.get("stage3_prefetch_bucket_size", 5e7)),
                int(zero.get("stage3_max_live_parameters", 1e9)),
                int(zero.get("stage3_max_reuse_distance", 1e9)),
            )
            most = most_whole(sizes, persistent, settings, job.policy, self.workload.accumulation)
            yield Part("weights", "gathered", most * e, (LOSS, BACKWARD, EVALUATION))
            kept = sum(sizes[name] for name in persistent)
            yield Part("weights", "gathered, persistent", kept * e, (REDUCE, SAVING))

    @property
    def frozen_bytes(self) -> int:
        """Of the fp32 values of what is frozen, which a rank keeps its part of in host memory."""
        return sum(4 * math.ceil(size / self.ranks) for name, size in self.sizes.items() if name not in self.names)

    @property
    def share(self) -> int:
        """S: elements that a rank steps."""
        return sum(flat.share for flat in self.flats)

    def _buffer(self, e: int) -> int:
        if not self.job.zero.get("contiguous_gradients", True):
            return 0
        return e * self.bucket * (2 if self.job.zero.get("overlap_comm") and self.job.stage < 3 else 1)

    @property
    def _fullest(self) -> int:
        """R: elements of the fullest bucket; a gradient that is larger than a bucket is alone in one."""
        sizes = self.sizes
        return max((sum(sizes[name] for name in names) for names in self.buckets), default=0)

    def _reduced(self, e: int) -> int:
        """A bucket in one piece, and as it is sent."""
        sent = self.job.gradient_bytes
        return self._fullest * (e + (sent if sent != e else 0))

    def _scattered(self) -> int:
        """A bucket as it is sent, and a rank's part of it as it is added up."""
        sent, sums = self.job.gradient_bytes, sum_bytes(self.job)
        return self._fullest * sent + (self._fullest * sums // self.ranks if sums != sent else 0)

    @property
    def _largest(self) -> int:
        return max((self.sizes[name] for name in self.names), default=0)

    def _largest_of_groups(self) -> list[int]:
        return [max(flat.share for flat in self.flats if flat.names[0] in group) for group in self.job.groups if group]

    def _large(self, block: int) -> int:
        """Elements of gradients that fit no bucket; those that the rank steps a part of stay until the backward pass ends."""
        sizes = self.sizes
        names = [name for name in self.names if sizes[name] > self.bucket and self.blocks[name] > block]
        return min(sum(sizes[name] for name in names), self.share + self._largest)


def _engine_bucket(sizes: list[int]) -> int:
    """Elements that the engine itself reduces together at most: a bucket goes off once it is passed."""
    most = filled = 0
    for size in sizes:
        filled += size
        most = max(most, filled)
        if filled > ENGINE_BUCKET:
            filled = 0
    return most
