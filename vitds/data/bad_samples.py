"""Images that cannot be used: named, counted over the whole run, and no more of them than the run file allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, get_args

from vitds import dist
from vitds.data.sources import Role
from vitds.errors import UserError
from vitds.json_files import say

NAMED = 5
"""Bad samples of a start that are named on the console; further ones only where they are kept."""


@dataclass(frozen=True)
class BadSample:
    """An image that could not be used, and the position (or evaluation index) at which it was met."""

    key: str
    reason: str
    position: int


class Journal(Protocol):
    """Where a run keeps its bad samples (vitds.run_directory.RunDirectory)."""

    def bad_samples(self) -> list[dict[str, Any]]:
        """All that were added: `role` and the fields of a BadSample. Collective; the same on every rank."""

    def add_bad_samples(self, found: Sequence[dict[str, Any]]) -> None:
        """Keep these. Not collective."""


class TooManyBad(UserError):
    """More images cannot be used than the run file allows. Raised on all ranks at once, where nothing is half done."""


class BadSamples:
    """The bad samples of a run: each image once for its role, whichever rank meets it and in whichever start, and however
    often. Made on all ranks together.

    Args:
        cap: so many may be bad of the training images, and so many of the evaluation's.
        journal: keeps them from one start to the next; None: they are forgotten with this object.

    Raises:
        TooManyBad: there are more than that from earlier starts.
        UserError: the journal holds what `share` would not have written.
    """

    def __init__(self, cap: int, journal: Journal | None = None) -> None:
        self.cap = cap
        self._journal = journal
        self._known: dict[tuple[Role, str], BadSample] = {}
        self._untold: dict[tuple[Role, str], BadSample] = {}
        """What this rank has met and not shared yet."""
        self._named = 0
        for row in journal.bad_samples() if journal is not None else []:
            try:
                self._known.setdefault((row["role"], row["key"]), BadSample(row["key"], row["reason"], row["position"]))
            except KeyError as missing:
                raise UserError(f"bad_samples.jsonl in the run's directory: a line without {missing}: {row}") from None
        self._check()

    @property
    def news(self) -> bool:
        """Whether this rank has met some of which the others do not know."""
        return bool(self._untold)

    def found(self, role: Role) -> list[BadSample]:
        """Those of which this rank knows, in the order in which it got to know them."""
        return [bad for (its_role, _), bad in [*self._known.items(), *self._untold.items()] if its_role == role]

    def row(self, role: Role) -> dict[str, float]:
        """For the metrics: how many have been found in this run; the same on all ranks after `share`."""
        name = "data/bad_samples" if role == "train" else f"data/bad_samples_{role}"
        return {name: float(sum(its_role == role for its_role, _ in self._known))}

    def meet(self, role: Role, met: Sequence[BadSample]) -> None:
        """Take note of what a batch of this rank's met."""
        for bad in met:
            if (role, bad.key) not in self._known:
                self._untold.setdefault((role, bad.key), bad)

    def share(self) -> None:
        """Tell all ranks, the journal and the console what is new. Collective.

        Raises:
            TooManyBad: they are more than the cap; what is new is kept first.
        """
        told = [item for items in dist.all_objects(list(self._untold.items())) for item in items]
        self._untold.clear()
        new: dict[tuple[Role, str], BadSample] = {}
        for name, bad in sorted(told, key=lambda item: item[1].position):
            new.setdefault(name, bad)
        self._known |= new
        if dist.is_main():
            self._keep(new)
            self._say(new)
        self._check()

    def keep_untold(self) -> None:
        """Leave word of what this rank has met, for it is about to end alone."""
        self._keep(self._untold)

    def _keep(self, samples: dict[tuple[Role, str], BadSample]) -> None:
        if self._journal is not None:
            self._journal.add_bad_samples([{"role": role, **asdict(bad)} for (role, _), bad in samples.items()])

    def _say(self, samples: dict[tuple[Role, str], BadSample]) -> None:
        for (role, _), bad in list(samples.items())[: max(0, NAMED - self._named)]:
            say(f"vitds: bad sample of vitds.data.{role}: {bad.key}: {bad.reason}")
        if self._named <= NAMED < self._named + len(samples):
            say("vitds: further bad samples are counted in the metrics and named in bad_samples.jsonl alone")
        self._named += len(samples)

    def _check(self) -> None:
        for role in get_args(Role):
            found = [bad for (its_role, _), bad in self._known.items() if its_role == role]
            if len(found) > self.cap:
                more = "" if self._journal is None else (
                    ". bad_samples.jsonl in the run's directory names all of them; "
                    "go on with --set vitds.data.max_bad_samples=…, or, where files were mended, without their lines in it"
                )  # fmt: skip
                raise TooManyBad(too_many_bad(found, self.cap, role) + more)


def too_many_bad(bad_samples: Sequence[BadSample], cap: int, role: Role) -> str:
    """The message when more images cannot be used than the run file allows."""
    distinct = list({bad.key: bad for bad in bad_samples}.values())
    listed = "; ".join(f"{bad.key} ({bad.reason})" for bad in distinct[:3]) + ("; …" if len(distinct) > 3 else "")
    count = f"all {len(distinct)} images" if len(distinct) <= cap else f"{len(distinct)} images"
    return f"vitds.data.{role}: {count} cannot be used (vitds.data.max_bad_samples is {cap}): {listed}"
