"""Which weights ZeRO-3 gathers in a micro batch, and when: DeepSpeed 0.19.8's rules, replayed on parameter sizes.

Weights are gathered before a module computes, in forward and again in backward, and let go of after it. How often a
weight travels is decided by three settings: a module that comes again within `stage3_max_reuse_distance` parameters is
kept; one that is still there is passed over, and so kept, when the next `stage3_prefetch_bucket_size` parameters are
fetched ahead; and nothing is fetched ahead past `stage3_max_live_parameters`. Small models are so gathered once a micro
batch, large ones almost twice, and activation checkpointing adds little: what a block computes again it needs at once.
(deepspeed/runtime/zero/partitioned_param_coordinator.py: fetch_sub_module, release_sub_module.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from vitds.models.activation_checkpointing import per_block


class Event(NamedTuple):
    """A module's weights are needed (`fetch`), or it is done with them."""

    fetch: bool
    module: str
    forward: bool


@dataclass
class Gather:
    """One collective: the parameters gathered together, and in which pass."""

    forward: bool
    names: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """The keys of `zero_optimization` that decide, by their meaning; in parameters."""

    prefetch: int = 50_000_000
    max_live: int = 1_000_000_000
    reuse_distance: int = 1_000_000_000


def modules_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Module -> its own parameters, in the order in which the modules begin to compute (the order of `names`).

    Those that only hold others are there too, with none: DeepSpeed fetches ahead and counts its steps at each of them.
    """
    modules: dict[str, list[str]] = {"": []}
    for name in names:
        words = name.split(".")
        for end in range(1, len(words)):
            if words[:end] != ["blocks"]:  # a list, which is never called
                modules.setdefault(".".join(words[:end]), [])
        modules[".".join(words[:-1])].append(name)
    return modules


def forward_events(modules: Sequence[str]) -> list[Event]:
    """A module's weights are held until all that is inside it has computed."""
    events, open_modules = list[Event](), list[str]()
    for module in modules:
        while open_modules and not _inside(module, open_modules[-1]):
            events.append(Event(False, open_modules.pop(), True))
        events.append(Event(True, module, True))
        open_modules.append(module)
    return events + [Event(False, module, True) for module in reversed(open_modules)]


def backward_events(forward: Sequence[Event], last: Sequence[str], recomputed: Sequence[str]) -> list[Event]:
    """Forward in reverse. A block that is recomputed runs forward again once the backward of its last module has begun.

    Args:
        last: for each recomputed block, the last module in it that has weights.
        recomputed: prefixes of the names inside these blocks.
    """
    events = list[Event]()
    for event in reversed(forward):
        events.append(Event(not event.fetch, event.module, False))
        if not event.fetch and event.module in last:
            inside = [e for e in forward if e.module.startswith(recomputed[last.index(event.module)])]
            # torch stops as soon as the last saved tensor is there, inside the last module
            events += inside[: inside.index(Event(False, event.module, True))]
    return events


@dataclass
class Coordinator:
    """DeepSpeed's bookkeeping of what is whole on this rank, once it has learnt the order of modules."""

    modules: Mapping[str, Sequence[str]]
    sizes: Mapping[str, int]
    persistent: frozenset[str]
    settings: Settings
    events: Sequence[Event]
    whole: set[str] = field(default_factory=set)
    most: int = 0
    """The most parameters that were whole at a time, and being gathered: a gather lies in one piece first, then in its own."""
    _kept: dict[tuple[str, int], set[str]] = field(default_factory=dict)

    def run(self, whole: Set[str], micro_batches: int) -> list[list[Gather]]:
        """So many micro batches from a state; from the first that leaves all as it was, the others are like it."""
        self.whole = set(whole)
        found = list[list[Gather]]()
        while len(found) < micro_batches:
            before, decided = set(self.whole), len(self._kept)
            found.append(self.micro_batch())
            if self.whole == before and len(self._kept) == decided:
                found += found[-1:] * (micro_batches - len(found))
        return found

    def micro_batch(self) -> list[Gather]:
        """The gathers of one forward and backward pass, in order."""
        order = [event.module for event in self.events if event.fetch]
        queue = deque((name, step) for step, module in enumerate(order) for name in self.modules[module])
        last_seen: dict[str, int] = {}
        active: dict[str, set[str]] = {}
        step = live = 0
        found = list[Gather]()

        def gather(names: Sequence[str], forward: bool) -> None:
            nonlocal live
            missing = tuple(name for name in names if name not in self.whole)
            if missing:
                found.append(Gather(forward, missing))
                self.whole.update(missing)
                new = sum(self.sizes[name] for name in missing)
                live += new
                self.most = max(self.most, sum(self.sizes[name] for name in self.whole) + new)

        for event in self.events:
            own = self.modules[event.module]
            if not event.fetch:
                released = self._released(event.module, step, order, last_seen)
                for name in own:
                    active.get(name, set()).discard(event.module)
                    if name in released and name in self.whole and not active.get(name):
                        self.whole.discard(name)
                        live -= self.sizes[name]
                continue
            gather(own, event.forward)
            for name in own:
                active.setdefault(name, set()).add(event.module)
            due = {name for name in own if last_seen.get(name, -1) < step}
            popped = set[str]()
            while queue and len(popped) < len(due):
                name, at = queue.popleft()
                last_seen[name] = at
                popped.add(name)
            ahead, count = list[str](), 0
            while queue and count < min(self.settings.max_live - live, self.settings.prefetch):
                name, at = queue.popleft()
                last_seen[name] = max(last_seen.get(name, -1), at)
                if name not in self.whole and name not in ahead:
                    ahead.append(name)
                    count += self.sizes[name]
            gather(ahead, event.forward)
            step += 1
        return found

    def _released(self, module: str, step: int, order: Sequence[str], last_seen: Mapping[str, int]) -> set[str]:
        """What may go when a module is done: nothing that persists, was passed over by a fetch ahead, or comes again soon."""
        if (module, step) not in self._kept:  # DeepSpeed too decides once and remembers
            names = {n for n in self.modules[module] if n not in self.persistent and last_seen.get(n, -1) <= step}
            distance = 0
            for later in order[step:]:
                if distance >= self.settings.reuse_distance or not names:
                    break
                names -= set(self.modules[later])
                distance += sum(self.sizes[name] for name in self.modules[later])
            self._kept[module, step] = names
        return self._kept[module, step]


def gathers(
    sizes: Mapping[str, int], persistent: frozenset[str], settings: Settings, policy: str, micro_batches: int
) -> list[list[Gather]]:
    """The gathers of every micro batch of one optimizer step, in the long run.

    Args:
        sizes: parameter name -> elements, in the model's order.
        persistent: parameters that stay whole from step to step.
        policy: `vitds.train.activation_checkpointing`.
    """
    return _gathers(tuple(sizes.items()), persistent, settings, policy, micro_batches)[0]


def most_whole(
    sizes: Mapping[str, int], persistent: frozenset[str], settings: Settings, policy: str, micro_batches: int
) -> int:
    """The most elements of gathered weights at a time; arguments as of `gathers`."""
    return _gathers(tuple(sizes.items()), persistent, settings, policy, micro_batches)[1]


@lru_cache(maxsize=64)
def _gathers(
    items: tuple[tuple[str, int], ...], persistent: frozenset[str], settings: Settings, policy: str, micro_batches: int
) -> tuple[list[list[Gather]], int]:
    sizes = dict(items)
    modules = modules_of(list(sizes))
    depth = 1 + max((int(m.split(".")[1]) for m in modules if m.startswith("blocks.")), default=-1)
    recomputed = [f"blocks.{i}." for i, what in enumerate(per_block(policy, depth)) if what != "none"]
    last = [next(m for m in reversed(modules) if m.startswith(block) and modules[m]) for block in recomputed]
    forward = forward_events(list(modules))
    events = [*forward, *backward_events(forward, last, recomputed)]
    coordinator = Coordinator(modules, sizes, persistent, settings, events)
    # What may be let go of is decided once, in the run's second micro batch, and remembered. The first, which learns the
    # order, lets go of what persists too, but for the module that sees the images: no gradient goes past it to tell.
    first = next(own for own in list(modules.values())[1:] if own)
    if micro_batches > 1:
        coordinator.run(persistent & set(first), micro_batches - 1)
    for _ in range(2):  # the optimizer's step lets go of all, then gathers those that stay
        found = coordinator.run(persistent, micro_batches)
    return found, coordinator.most


def _inside(module: str, outer: str) -> bool:
    return not outer or module.startswith(f"{outer}.")
