"""SOURCES: where images come from, by name, and the one thing a loader may know of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import numpy as np

from vitds.data.digits import Digits
from vitds.data.folder import Folder
from vitds.data.synthetic import Synthetic
from vitds.errors import UserError

if TYPE_CHECKING:
    from vitds.data.section import DataSection, SourceSection

Role = Literal["train", "eval"]


class Source(Protocol):
    """Images by index. A source is read by several processes at once, forked or unpickled."""

    keys: ClassVar[tuple[str, ...]]
    """Keys of the section, beside `source` and `transforms`, that this source reads; others are refused."""
    multi_label: ClassVar[bool]
    """Whether labels are lists of classes."""

    @property
    def num_classes(self) -> int: ...

    @property
    def class_names(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes | np.ndarray, int | list[int], str]:
        """(image, label, key) of image `index`.

        The image is an encoded file or a uint8 array (H, W) or (H, W, 3); the label a class, or in a multi-label
        source a list of classes; the key a name by which a person finds the image.

        Raises:
            RuntimeError: the storage failed, several times over.
        """
        ...


SOURCES: dict[str, type[Source]] = {"digits": Digits, "synthetic": Synthetic, "folder": Folder}


def build_source(section: SourceSection, role: Role) -> Source:
    """The source of a section, for training or for evaluation.

    Raises:
        UserError: a key that this source does not read, or what the source itself finds amiss.
    """
    source = SOURCES[section.source]
    for name in ("path", "split", "num_images", "num_classes", "image_size"):
        if getattr(section, name) is not None and name not in source.keys:
            raise UserError(
                f"vitds.data.{role}.{name}: source {section.source!r} does not read it; "
                f"it reads {', '.join(source.keys) or 'no further keys'}"
            )
    return source(section, role)  # type: ignore[call-arg]


def build_sources(section: DataSection, num_classes: int) -> tuple[Source, Source | None]:
    """The training and the evaluation source, both fit for a model of `num_classes`.

    Raises:
        UserError: as `build_source`; more classes than the model has; the two do not have the same classes.
    """
    train = build_source(section.train, "train")
    check_classes(train, num_classes, "train")
    if section.eval is None:
        return train, None
    evaluation = build_source(section.eval, "eval")
    check_classes(evaluation, num_classes, "eval")
    if section.train.source == section.eval.source and train.class_names != evaluation.class_names:
        only_train = sorted(set(train.class_names) - set(evaluation.class_names))
        only_eval = sorted(set(evaluation.class_names) - set(train.class_names))
        raise UserError(
            "vitds.data.train and vitds.data.eval number their classes differently; "
            f"only in train: {_some(only_train)}; only in eval: {_some(only_eval)}"
        )
    return train, evaluation


def check_classes(source: Source, num_classes: int, role: Role) -> None:
    """Refuses a source with more classes than the model."""
    if source.num_classes > num_classes:
        raise UserError(
            f"vitds.data.{role}: {source.num_classes} classes ({_some(source.class_names)}), "
            f"but vitds.model.num_classes is {num_classes}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "") if names else "none"
