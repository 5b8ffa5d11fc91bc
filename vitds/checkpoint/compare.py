"""Two checkpoints, tensor by tensor, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vitds.checkpoint.format import TRAINING_STATE
from vitds.checkpoint.load import Checkpoint
from vitds.checkpoint.tensorfile import TensorSpec

CHUNK_ELEMENTS = 2**22
"""Elements of each side held at once."""
SHOWN = 40
"""Lines of one kind that are shown; the worst come first."""
WRITTEN_BY = ("world_size", "zero_stage", "versions")
"""Keys of training_state.json that say who wrote it: shown, but no difference of the state."""
CARD = "README.md"
"""Tells people of the state; what is to be told of it may grow from one version to the next."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """How far apart two tensors of one name, shape and dtype are."""

    name: str
    numel: int
    differing: int
    """Elements whose bits differ."""
    largest: float
    """Largest absolute difference; inf where one side is not finite and the other is something else."""
    relative: float
    """√(Σ(a−b)² / max(Σa², Σb²)), in float64."""


def compare(one: Checkpoint, other: Checkpoint, tolerance: float | None = None) -> tuple[bool, list[str]]:
    """Whether two checkpoints hold the same state, and a report.

    Args:
        one: a.
        other: b.
        tolerance: relative difference up to which floating-point tensors, and numbers in training_state.json, count
            as the same; None: bit for bit.
    """
    lines = [f"a: {one.path}", f"b: {other.path}"]
    same = True
    for kind in dict.fromkeys([*one.kinds, *other.kinds]):
        if kind not in one.kinds or kind not in other.kinds:
            lines.append(f"{kind}: only in {'a' if kind in one.kinds else 'b'}")
            same = False
            continue
        equal, report = _compare_kind(one, other, kind, tolerance)
        same, lines = same and equal, lines + report
    equal, report = _compare_state(one.training_state, other.training_state, tolerance)
    same, lines = same and equal, lines + report
    for name in _other_files(one, other):
        lines.append(f"{name}: differs" + (", which is no difference of the state" if name == CARD else ""))
        same = same and name == CARD
    return same, [*lines, "the same" if same else "different"]


def _compare_kind(one: Checkpoint, other: Checkpoint, kind: str, tolerance: float | None) -> tuple[bool, list[str]]:
    a, b = ({name: stored.spec for name, stored in side.kinds[kind].items()} for side in (one, other))
    problems = [f"only in a: {_say(spec)}" for name, spec in a.items() if name not in b]
    problems += [f"only in b: {_say(spec)}" for name, spec in b.items() if name not in a]
    problems += [f"{_say(a[name])} in a, {_say(b[name])} in b" for name in a if name in b and a[name] != b[name]]
    shared = [name for name in a if a[name] == b.get(name)]
    found = [difference(one, other, kind, name) for name in shared]
    apart = sorted((d for d in found if d.differing), key=lambda d: (-d.relative, -d.largest, d.name))
    beyond = [
        d for d in apart if tolerance is None or not a[d.name].dtype.is_floating_point or not d.relative <= tolerance
    ]
    summary = f"{kind}: {len(shared)} tensors on both sides, {len(shared) - len(apart)} equal bit for bit"
    if tolerance is not None:
        summary += f", {len(apart) - len(beyond)} more within {tolerance:g}"
    lines = [summary + (f", {len(beyond)} differ" if beyond else ""), *_cut(problems)]
    if apart:
        lines.append(f"  {'relative rms':>12}  {'max abs':>10}  {'differing':>12}  {'of':>12}  tensor")
        lines += _cut(
            [f"{d.relative:12.3e}  {d.largest:10.3e}  {d.differing:12,}  {d.numel:12,}  {d.name}" for d in apart]
        )
    return not problems and not beyond, lines


def difference(one: Checkpoint, other: Checkpoint, kind: str, name: str) -> Difference:
    """Compare one tensor that both sides hold with the same shape and dtype, chunk by chunk."""
    spec = one.kinds[kind][name].spec
    if all(torch.equal(a, b) for a, b in _chunks(one, other, kind, name, _INTEGERS[spec.dtype.itemsize])):
        return Difference(name, spec.numel, 0, 0.0, 0.0)
    differing, largest, gaps, squares = 0, 0.0, 0.0, [0.0, 0.0]
    for a, b in _chunks(one, other, kind, name, None):
        unequal = a.view(_INTEGERS[a.element_size()]) != b.view(_INTEGERS[a.element_size()])
        differing += int(unequal.sum())
        gap = torch.where(unequal, a.double() - b.double(), 0.0).abs().nan_to_num(nan=math.inf)
        largest = max(largest, float(gap.max()))
        gaps += float(gap.square().sum())
        for i, side in enumerate((a.double(), b.double())):
            squares[i] += float(torch.where(side.isfinite(), side, 0.0).square().sum())
    relative = math.inf if math.isinf(gaps) else math.sqrt(gaps / max(squares)) if gaps else 0.0
    return Difference(name, spec.numel, differing, largest, relative)


def _chunks(
    one: Checkpoint, other: Checkpoint, kind: str, name: str, view: torch.dtype | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both sides of a tensor, piece by piece: (≤ CHUNK_ELEMENTS,) each, as they are or their bits as integers."""
    total = one.kinds[kind][name].spec.numel
    for start in range(0, total, CHUNK_ELEMENTS):
        numel = min(CHUNK_ELEMENTS, total - start)
        a, b = (side.read_tensor(name, start, numel, kind) for side in (one, other))
        yield (a, b) if view is None else (a.view(view), b.view(view))


def _compare_state(a: dict[str, Any], b: dict[str, Any], tolerance: float | None) -> tuple[bool, list[str]]:
    one, other = _leaves(a), _leaves(b)
    keys = [key for key in dict.fromkeys([*one, *other]) if not _same(one.get(key), other.get(key), tolerance)]
    counted = [key for key in keys if key.split(".")[0] not in WRITTEN_BY]
    told = [key for key in keys if key not in counted]
    lines = [f"{TRAINING_STATE}: {len(counted)} differ" if counted else f"{TRAINING_STATE}: equal"]
    lines += _cut([_arrow(key, one, other) for key in counted])
    lines += [f"  (written by: {_arrow(key, one, other)})" for key in told]
    return not counted, lines


def _leaves(value: Any, place: str = "") -> dict[str, Any]:
    """Dotted place -> everything in a JSON value that is not an object or list, empty ones included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None or not value:
        return {place: value}
    found: dict[str, Any] = {}
    for key, inner in items:
        found |= _leaves(inner, f"{place}.{key}" if place else str(key))
    return found


def _same(a: Any, b: Any, tolerance: float | None) -> bool:
    if tolerance is not None and isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= tolerance * max(abs(a), abs(b))
    return type(a) is type(b) and a == b


def _arrow(key: str, a: dict[str, Any], b: dict[str, Any]) -> str:
    return f"{key}: {str(a.get(key, '(missing)'))[:80]} → {str(b.get(key, '(missing)'))[:80]}"


def _other_files(one: Checkpoint, other: Checkpoint) -> list[str]:
    """Files besides tensors, indexes and the training state that are not the same on both sides."""
    a, b = (
        {
            name: record
            for name, record in side.manifest.files.items()
            if ".safetensors" not in name and name != TRAINING_STATE
        }
        for side in (one, other)
    )
    return [name for name in dict.fromkeys([*a, *b]) if a.get(name) != b.get(name)]


def _say(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.shape} {str(spec.dtype).removeprefix('torch.')}"


def _cut(lines: list[str]) -> list[str]:
    more = [f"  and {len(lines) - SHOWN:,} more"] if len(lines) > SHOWN else []
    return [f"  {line}" for line in lines[:SHOWN]] + more
