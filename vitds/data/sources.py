"""SOURCES: where images come from, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vitds import dist
from vitds.data.digits import Digits
from vitds.data.exclusion import leave_out
from vitds.data.folder import Folder
from vitds.data.hf import HuggingFace
from vitds.data.minival import hold_out
from vitds.data.source import Source
from vitds.data.synthetic import Synthetic
from vitds.data.tar import Tar
from vitds.errors import UserError
from vitds.json_files import say

if TYPE_CHECKING:
    from vitds.data.section import DataSection, SourceSection

Role = Literal["train", "eval", "minival"]
"""What images are for. A minival's are prepared as those of the evaluation are."""


class Sources(NamedTuple):
    """The images of a run."""

    train: Source
    eval: Source | None = None
    minival: Source | None = None
    """Images of the training set that are not trained on."""

    def identity(self) -> dict[str, dict[str, Any]]:
        """By role, the number and the digest of the images: what a run keeps to know them again."""
        sources = {role: source for role, source in self._asdict().items() if source is not None}
        return {role: {"images": len(source), "digest": source.digest()} for role, source in sources.items()}


SOURCES: dict[str, type[Source]] = {
    "digits": Digits,
    "synthetic": Synthetic,
    "folder": Folder,
    "tar": Tar,
    "hf": HuggingFace,
}


OWN_KEYS = (
    "path", "index_dir", "classes", "label_key", "image_key", "split", "num_images", "num_classes", "image_size",
)  # fmt: skip
"""Keys of a SourceSection that only some sources read."""


def build_source(section: SourceSection, role: Role) -> Source:
    """The source of a section, for training or for evaluation, without the images that it excludes.

    Raises:
        UserError: a key that this source does not read, what the source itself finds amiss, or a list of images to
            exclude that is not of this source.
    """
    source = SOURCES[section.source]
    if not (isinstance(source, type) and issubclass(source, Source)):
        raise UserError(f"vitds.data.{role}.source: {section.source!r} is not derived from vitds.data.Source")
    for name in OWN_KEYS:
        if getattr(section, name) is not None and name not in source.keys:
            raise UserError(
                f"vitds.data.{role}.{name}: source {section.source!r} does not read it; "
                f"it reads {', '.join(source.keys) or 'no further keys'}"
            )
    built: Source = source(section, role)  # type: ignore[call-arg]
    return built if section.exclude is None else leave_out(built, section.exclude, f"vitds.data.{role}.exclude")


def build_sources(section: DataSection, num_classes: int) -> Sources:
    """The sources of all roles, fit for a model of `num_classes`.

    Raises:
        UserError: as `build_source`; more classes than the model has, or labels; two name their classes differently; a minival of
            all images.
    """
    train = build_source(section.train, "train")
    check_classes(train, num_classes, "train")
    _check_labels(train, num_classes, "train", section.max_bad_samples)
    if section.order.kind == "windowed" and dist.is_main() and (alike := stored_by_class(train)):
        say(
            f"vitds: vitds.data.order: windowed, but {alike}: batches will be of few classes. Pack the images shuffled, as "
            "`vitds data pack` does, or take the full order"
        )
    train, minival = hold_out(train, section.minival)
    if section.eval is None:
        return Sources(train, None, minival)
    evaluation = build_source(section.eval, "eval")
    check_classes(evaluation, num_classes, "eval")
    _check_labels(evaluation, num_classes, "eval", section.max_bad_samples)
    known = train.class_names and evaluation.class_names
    if known and list(train.class_names) != list(evaluation.class_names):
        only_train = sorted(set(train.class_names) - set(evaluation.class_names))
        only_eval = sorted(set(evaluation.class_names) - set(train.class_names))
        raise UserError(
            "vitds.data.train and vitds.data.eval number their classes differently; "
            f"only in train: {_some(only_train)}; only in eval: {_some(only_eval)}"
        )
    return Sources(train, evaluation, minival)


def stored_by_class(source: Source, places: int = 32) -> str:
    """Whether images seem to be stored by class, in words; "" if not. Looks at a few labels only."""
    total = len(source)
    first = [place * total // places for place in range(places)]
    here, next_to_it, far_away = (
        [source.label((index + step) % total) for index in first] for step in (0, 1, total // 2)
    )
    near, far = (sum(a == b for a, b in zip(here, there, strict=True)) for there in (next_to_it, far_away))
    return f"of {places} pairs of neighbours in storage {near} have the same label" if near - far > places / 2 else ""


def check_classes(source: Source, num_classes: int, role: Role) -> None:
    """Refuses a source with more classes than the model."""
    if len(source.class_names) > num_classes:
        raise UserError(
            f"vitds.data.{role}: {len(source.class_names)} classes ({_some(source.class_names)}), "
            f"but vitds.model.num_classes is {num_classes}"
        )


def _check_labels(source: Source, num_classes: int, role: Role, most: int) -> None:
    """Refuses labels that the model has no class for, where more images have them than may be bad."""
    count = source.count_labels_from(num_classes)
    if count > most:
        raise UserError(
            f"vitds.data.{role}: {count} images have labels of {num_classes} or more, but vitds.model.num_classes is "
            f"{num_classes} (and vitds.data.max_bad_samples {most})"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "") if names else "none"
