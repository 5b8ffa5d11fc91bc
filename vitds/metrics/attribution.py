"""Where the time of profiled steps went, from the events of a trace: a pure function of what torch.profiler wrote.

On a GPU the pieces of work are its kernels and copies; on a CPU, operators' self time. Every instant of the steps is given to
one kind, so the shares add up to one: to compute before copies, to copies before communication, and to waiting where nothing
ran. So communication's share is the part of it that nothing hid.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

STEP = "vitds.step"
"""The range around one optimizer step."""
OPTIMIZER = "vitds.optimizer"
"""The range around the update: norm, clipping, masters, state, and the weights made from them."""

KINDS = ("matmul", "attention", "norms", "elementwise", "optimizer", "copies", "communication")
"""In the order in which they are given an instant that two of them share."""
WAITING, BETWEEN = "waiting", "between steps"

# The first that is found in a name decides; what none is found in is elementwise. Compiled kernels carry the names of what was
# fused into them: a norm with the residual's addition is a norm.
PATTERNS = {
    "communication": r"nccl|rccl|^gloo:|c10d|all_?reduce|all_?gather|reduce_?scatter|broadcast_?kernel",
    "attention": r"flash|fmha|attention|sdpa|_mha",
    "norms": r"(layer|rms|batch|group)_?norm|gammabeta|ComputeGradInput",
    "matmul": r"gemm|gemv|cutlass|xmma|nvjet|cublas|splitk|triton_(tem|mm)|convolution|mkldnn_linear"
    r"|^aten::(addmm|mm|bmm|baddbmm|matmul|linear|_scaled_mm|_int_mm|einsum)$",
    "copies": r"memcpy|memset|copy|CatArray|^aten::(to|clone|contiguous|cat|stack)$",
}
_COMPILED = [(kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in PATTERNS.items()]
_UPDATE = re.compile(rf"^(Optimizer\.step#|{re.escape(OPTIMIZER)})")
_HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def kind_of(name: str, ranges: Sequence[str] = ()) -> str:
    """What a piece of work is: one of KINDS.

    Args:
        name: of the kernel or operator.
        ranges: operators and ranges around it (on a GPU, around its launch).
    """
    own = next((kind for kind, pattern in _COMPILED if pattern.search(name)), None)
    if own == "communication":
        return own
    if any(_UPDATE.search(outer) for outer in ranges):
        return "optimizer"
    if own is None or own in ("matmul", "copies"):  # attention by its plain formula is made of these
        attention = _COMPILED[1][1]
        own = "attention" if any(attention.search(outer) for outer in ranges) else own
    return own or "elementwise"


@dataclass
class Cost:
    """All pieces of work of one name."""

    name: str
    kind: str
    seconds: float = 0.0
    calls: int = 0


@dataclass
class Attribution:
    """Time of the profiled steps of one rank; seconds."""

    steps: int
    seconds: float
    """Wall time from the first step's begin to the last one's end."""
    on_device: bool
    """Whether the pieces are a GPU's kernels; else they are operators on the CPU."""
    exclusive: dict[str, float] = field(default_factory=dict)
    """Of every kind, waiting and what lies between steps: the instants given to it. They add up to `seconds`."""
    communication: float = 0.0
    """Time in which any communication went on, hidden or not."""
    costs: list[Cost] = field(default_factory=list)
    """By name, the most expensive first; pieces that ran at once count each."""

    def table(self, count: int = 10) -> str:
        """The shares and the `count` most expensive names, for a person."""
        unit = "kernels of the device" if self.on_device else "operators on the CPU (self time)"
        each = self.seconds / self.steps
        lines = [f"{self.steps} step(s) of {_time(each)} each; shares of that time, by {unit}:"]
        for kind in (*KINDS, WAITING, BETWEEN):
            if kind != BETWEEN or self.exclusive[kind] > 0.0005 * self.seconds:
                part = self.exclusive[kind]
                lines.append(f"  {kind:<13} {part / self.seconds:6.1%}  {_time(part / self.steps):>9} a step")
        if self.communication:
            hidden = self.communication - self.exclusive["communication"]
            lines.append(
                f"  (communication went on for {_time(self.communication / self.steps)} a step, "
                f"{_time(hidden / self.steps)} of it while other work ran)"
            )
        lines.append(f"the {count} most expensive: share, time and calls a step, kind, name")
        for cost in self.costs[:count]:
            share, calls = cost.seconds / self.seconds, f"{cost.calls / self.steps:g}"
            lines.append(
                f"  {share:6.1%}  {_time(cost.seconds / self.steps):>9}  {calls:>7}  {cost.kind:<13}  {cost.name[:100]}"
            )
        return "\n".join(lines)


class _Span(NamedTuple):
    """What a host thread did, with the names around it and the time in which nothing inside it ran."""

    start: float
    end: float
    event: Mapping[str, Any]
    ranges: tuple[str, ...]
    own: list[tuple[float, float]]


class _Piece(NamedTuple):
    """Work of one name; an operator that calls others is in several pieces, of which the first counts as the call."""

    start: float
    end: float
    name: str
    ranges: tuple[str, ...]
    launched: float
    calls: int = 1


def attribute(events: Sequence[Mapping[str, Any]]) -> Attribution | None:
    """The time of the steps that are in a trace; None if there is none.

    Args:
        events: `traceEvents` of the JSON; times in µs.
    """
    work = [event for event in events if event.get("ph") == "X"]
    spans = _nested([event for event in work if event.get("cat") in _HOST])
    steps = sorted((span.start, span.end) for span in spans if span.event["name"].startswith(STEP))
    if not steps:
        return None
    begin, end = steps[0][0], steps[-1][1]
    kernels = [event for event in work if event.get("cat") in _DEVICE]
    pieces = _launched(kernels, spans) if kernels else _operators(spans)
    costs, intervals = dict[tuple[str, str], Cost](), list[tuple[float, float, str]]()
    for piece in pieces:
        start, stop = max(piece.start, begin), min(piece.end, end)
        if stop <= start:
            continue
        inside = any(first <= piece.launched <= last for first, last in steps)
        kind = kind_of(piece.name, piece.ranges) if inside else BETWEEN
        intervals.append((start, stop, kind))
        cost = costs.setdefault((piece.name, kind), Cost(piece.name, kind))
        cost.seconds += (stop - start) / 1e6
        cost.calls += piece.calls
    found = Attribution(len(steps), (end - begin) / 1e6, bool(kernels))
    found.costs = sorted(costs.values(), key=lambda cost: -cost.seconds)
    found.exclusive = dict.fromkeys((*KINDS, WAITING, BETWEEN), 0.0)
    for length, running, in_step in _instants(intervals, steps):
        kind = next((k for k in (*KINDS, BETWEEN) if running[k]), WAITING if in_step else BETWEEN)
        found.exclusive[kind] += length / 1e6
        found.communication += length / 1e6 if running["communication"] else 0.0
    return found


def _nested(events: list[Mapping[str, Any]]) -> list[_Span]:
    """Every event of the host's threads with what is around it there."""
    spans, stacks, since = list[_Span](), dict[Any, list[_Span]](), dict[Any, float]()

    def close(thread: Any, until: float) -> None:
        stack = stacks[thread]
        while stack and stack[-1].end <= until:
            done = stack.pop()
            done.own.append((since[thread], done.end))
            since[thread] = done.end

    for event in sorted(events, key=lambda event: (event["ts"], -event.get("dur", 0.0))):
        thread, start = (event.get("pid"), event.get("tid")), float(event["ts"])
        stack = stacks.setdefault(thread, [])
        close(thread, start)
        ranges: tuple[str, ...] = ()
        if stack:
            stack[-1].own.append((since[thread], start))
            ranges = (*stack[-1].ranges, stack[-1].event["name"])
        since[thread] = start
        spans.append(_Span(start, start + float(event.get("dur", 0.0)), event, ranges, []))
        stack.append(spans[-1])
    for thread in stacks:
        close(thread, float("inf"))
    return spans


def _operators(spans: list[_Span]) -> Iterator[_Piece]:
    """Work on the CPU: operators without what they call, and collectives on the threads of their own."""
    for span in spans:
        name = span.event["name"]
        if span.event["cat"] == "cpu_op" or name.startswith("gloo:"):
            for i, (start, end) in enumerate(span.own):
                yield _Piece(start, end, name, span.ranges, span.start, calls=int(i == 0))


def _launched(kernels: list[Mapping[str, Any]], spans: list[_Span]) -> Iterator[_Piece]:
    """Work on a GPU, each piece with the ranges around the call that launched it."""
    launches = {
        span.event["args"]["correlation"]: span for span in spans if "correlation" in (span.event.get("args") or {})
    }
    for event in kernels:
        start, launch = float(event["ts"]), launches.get((event.get("args") or {}).get("correlation"))
        end = start + float(event.get("dur", 0.0))
        ranges, at = (launch.ranges, launch.start) if launch else ((), start)
        yield _Piece(start, end, event["name"], ranges, at)


def _instants(
    intervals: list[tuple[float, float, str]], steps: list[tuple[float, float]]
) -> Iterator[tuple[float, Counter[str], bool]]:
    """From the first step's begin to the last one's end: (length, how many pieces of each kind run, whether in a step)."""
    marks = [(start, kind, 1) for start, _, kind in intervals] + [(end, kind, -1) for _, end, kind in intervals]
    marks += [(start, STEP, 1) for start, _ in steps] + [(end, STEP, -1) for _, end in steps]
    running, before = Counter[str](), steps[0][0]
    for when, kind, change in sorted(marks):
        if when > before:
            yield when - before, running, running[STEP] > 0
            before = when
        running[kind] += change


def _time(seconds: float) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
