"""Images that a verb names: what stands behind --images, --train or --test, and the loader that reads it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from vitds import dist
from vitds.data import DataSection, EvalLoader, Source, SourceSection, build_source
from vitds.data.sources import Role
from vitds.data.transforms import build_transforms
from vitds.data_verbs.arguments import at_least_one, source_for
from vitds.errors import UserError, one_of
from vitds.inference.opening import Session

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

    def loader(
        self,
        session: Session,
        options: argparse.Namespace,
        *,
        transforms: list[Any] | None = None,
        num_classes: int | None = None,
    ) -> EvalLoader:
        """This rank's share of the images, each once over all ranks, prepared as the model's image processor does it, or as a
        run file's evaluation says.

        Args:
            options: with what `add_loading` adds.
            transforms: in place of the section's and of what the processor does, as a run file lists them.
            num_classes: of the labels; the model's when not given.

        Raises:
            UserError: the source has more classes.
        """
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
            rank=dist.rank(),
            world_size=dist.world_size(),
            transforms=[session.processor.fitted] if spec is None else build_transforms(spec, size, place),
        )


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
