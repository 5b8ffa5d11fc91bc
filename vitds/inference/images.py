"""Images that a verb names: what stands behind --images, --train or --test, and the loader that reads it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from vitds import dist
from vitds.data import DataSection, EvalLoader, Source, SourceSection, build_source
from vitds.data.images import Unusable
from vitds.data.source import Label, Sample, classes_of
from vitds.data.sources import Role
from vitds.data.transforms import build_transforms
from vitds.data_verbs.arguments import at_least_one, source_for
from vitds.errors import UserError, nearest, one_of
from vitds.inference.opening import Session
from vitds.json_files import say

WHAT = "class folders, tar shards, a data set (DIR or DIR:SPLIT), digits, digits:train, or a run file's (RUN.json:train or :eval)"
"""What may be named; for an argument's help."""
EMBEDDED = "digits"
ROLES = ("train", "eval")


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add --batch, --workers and --max-bad-samples."""
    parser.add_argument("--batch", type=at_least_one, default=64, metavar="N", help="images of a rank at once; 64")
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes of a rank that prepare images; 0"
    )
    parser.add_argument("--max-bad-samples", type=int, default=100, metavar="N",
                        help="images that may be unusable; they count for nothing, and one more ends it; 100")  # fmt: skip


@dataclass(frozen=True)
class ImageSet:
    """A set of images with labels."""

    name: str
    """As the user said it."""
    source: Source
    section: SourceSection
    """From which the source was made; its transforms are set only where a run file's evaluation sets them."""

    def with_classes_of(self, session: Session) -> ImageSet:
        """The same images, their classes by the model's numbers: classes go by their names, where both sides have names.

        Raises:
            UserError: classes that the model does not know.
        """
        theirs, ours = list(self.source.class_names), session.labels
        named = ours != [f"LABEL_{number}" for number in range(len(ours))]
        if not theirs or theirs == ours:
            return self
        if not named:
            if len(theirs) < len(ours):
                say(
                    f"vitds: {self.name}: {len(theirs)} classes, {len(ours)} of the model, which have no names: class i is "
                    "taken for its class i"
                )
            return self
        number_of = {name: number for number, name in enumerate(ours)}
        unknown = [name for name in theirs if name not in number_of]
        if unknown:
            raise UserError(
                f"{self.name}: {len(unknown)} of {len(theirs)} classes are not the model's: "
                f"{', '.join(map(repr, unknown[:3]))}{nearest(unknown[0], ours)}; the model's: "
                f"{', '.join(map(repr, ours[:3]))}, …; where classes are the same by number, say --by-number"
            )
        return replace(self, source=Renumbered(self.source, [number_of[name] for name in theirs], ours))

    def loader(
        self,
        session: Session,
        options: argparse.Namespace,
        *,
        transforms: list[Any] | None = None,
        num_classes: int | None = None,
        shared: bool = True,
    ) -> EvalLoader:
        """This rank's share of the images, each once over all ranks, prepared as the model's image processor does it, or as a
        run file's evaluation says.

        Args:
            options: with what `add_loading` adds.
            transforms: in place of the section's and of what the processor does, as a run file lists them.
            num_classes: of the labels; the model's when not given.
            shared: False: all images are this rank's.

        Raises:
            UserError: the source has more classes.
        """
        there = len(self.source.class_names)
        if num_classes is None and there > session.config.num_classes:
            raise UserError(
                f"{self.name}: {there} classes; the model {str(session.path)!r} knows {session.config.num_classes}"
            )
        spec = self.section.transforms if transforms is None else transforms
        size, place = session.config.image_size, "vitds.data.eval.transforms"
        data = DataSection(
            self.section, self.section, num_workers=options.workers, max_bad_samples=options.max_bad_samples
        )
        return EvalLoader(
            self.source,
            data,
            image_size=size,
            num_classes=session.config.num_classes if num_classes is None else num_classes,
            batch=options.batch,
            rank=dist.rank() if shared else 0,
            world_size=dist.world_size() if shared else 1,
            transforms=[session.processor.fitted] if spec is None else build_transforms(spec, size, place),
        )


class Renumbered(Source):
    """A source, its classes by other numbers.

    Args:
        source: whose labels are to be changed.
        numbers: by its own number of a class.
        names: of all classes by their new numbers.
    """

    def __init__(self, source: Source, numbers: Sequence[int], names: Sequence[str]) -> None:
        self._source, self._numbers = source, list(numbers)
        self.class_names, self.multi_label = names, source.multi_label

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> Sample:
        return self.read_many([index])[0]

    def read_many(self, indices: Sequence[int]) -> list[Sample]:
        return [(image, self._renumbered(label), key) for image, label, key in self._source.read_many(indices)]

    def key(self, index: int) -> str:
        return self._source.key(index)

    def _renumbered(self, label: Label | Unusable) -> Label | Unusable:
        if isinstance(label, Unusable):
            return label
        outside = [one for one in classes_of(label) if not 0 <= one < len(self._numbers)]
        if outside:
            return Unusable(f"label {outside[0]} is not one of the {len(self._numbers)} classes")
        return [self._numbers[one] for one in label] if isinstance(label, list) else self._numbers[label]


def image_set(text: str, load: Callable[..., Any], argument: str = "--images") -> ImageSet:
    """The images that `text` names; see WHAT.

    Args:
        load: vitds.config.load_run_file, which lives beside this room.
        argument: that held the text, for messages.

    Raises:
        UserError: nothing there, or nothing that can be read as images with labels.
    """
    base, part = _parted(text)
    if base == EMBEDDED:
        if part is not None and part not in ROLES:
            raise UserError(one_of(f"{argument} {text!r}: part", part, ROLES))
        section = SourceSection(EMBEDDED, split=part or "eval")
    elif base.endswith(".json"):
        role = cast(Role, part or "eval")
        if role not in ROLES:
            raise UserError(one_of(f"{argument} {text!r}: role", role, ROLES))
        found = getattr(load(base, [], world_size=None).vitds.data, role)
        if found is None:
            raise UserError(f"{argument} {text!r}: the run file has no vitds.data.{role}")
        section = cast(SourceSection, found) if role == "eval" else replace(found, transforms=None)
        return ImageSet(text, build_source(section, role), section)
    else:
        section = SourceSection(source_for(base), path=base, split=part)
    try:
        return ImageSet(text, build_source(section, "eval"), section)
    except UserError as error:
        raise UserError(str(error).replace("vitds.data.eval.path", argument)) from None


def _parted(text: str) -> tuple[str, str | None]:
    """What comes before and after the last colon, where what comes before is something that has parts."""
    base, colon, part = text.rpartition(":")
    if colon and not os.path.exists(text) and (base == EMBEDDED or base.endswith(".json") or Path(base).is_dir()):
        return base, part
    return text, None
