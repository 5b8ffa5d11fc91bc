"""Data sets of the `datasets` library on local disk, as Arrow files or parquet: an optional extra, "vitds[hf]"."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vitds.data.class_names import ClassNumbers, read_class_names
from vitds.data.hf_files import find_splits, load
from vitds.data.images import Unusable
from vitds.data.source import Label, Sample, Source
from vitds.data.storage import read_file
from vitds.errors import UserError, one_of

if TYPE_CHECKING:
    from datasets import Dataset

    from vitds.data.section import SourceSection

SPLITS = {"train": ("train",), "eval": ("validation", "eval", "test")}
"""By role, the splits that are taken where the run file names none: the first that there is."""
LABELS = ("label", "labels", "cls")
"""Columns that are taken for the labels where the run file names none: the first that there is."""


class HuggingFace(Source):
    """A data set as `save_to_disk` of `datasets` wrote it, or a folder of parquet files.

    Images are encoded files: a column of the feature Image, or of bytes. Labels are of the feature ClassLabel, whole
    numbers, words that `classes` lists, or lists of one of these, which makes them multi-label. Arrow files are mapped
    into memory, never loaded whole.
    """

    keys: ClassVar[tuple[str, ...]] = ("path", "split", "image_key", "label_key", "classes")

    def __init__(self, section: SourceSection, role: str) -> None:
        place = f"vitds.data.{role}"
        if section.path is None:
            raise UserError(f"{place}.path: missing; source 'hf' needs the directory of a data set")
        self._root = os.path.abspath(os.path.expanduser(section.path))
        splits = find_splits(self._root, f"{place}.path")
        split = _chosen_split(splits, section.split, role)
        data = load(self._root, split, splits[split], f"{place}.path")
        self._rows = split or "rows"
        self._image = _image_column(data, section.image_key, f"{place}.image_key")
        self._label = _label_column(data, section.label_key, f"{place}.label_key")
        self.multi_label, words, self.class_names = _label_kind(data, self._label, f"{place}.label_key")
        if section.classes is not None:
            listed = read_class_names(section.classes, f"{place}.classes")
            if self.class_names and listed != self.class_names:
                raise UserError(
                    f"{place}.classes: {section.classes!r} is not the list of classes that the data set brings"
                )
            self.class_names = listed
        elif words:
            raise UserError(f"{place}.classes: missing; the labels in column {self._label!r} are words, numbered by it")
        self._numbers = ClassNumbers(self.class_names) if words else None
        # As Arrow, so that `datasets` decodes no image.
        self._data = data.select_columns(list(dict.fromkeys((self._image, self._label)))).with_format("arrow")

    def __len__(self) -> int:
        return len(self._data)

    def key(self, index: int) -> str:
        return f"{self._rows}/{index}"

    def find(self, keys: Iterable[str]) -> dict[str, int]:
        found = {}
        for key in keys:
            row = key.rpartition("/")[2]
            if row.isdecimal() and int(row) < len(self) and key == self.key(int(row)):
                found[key] = int(row)
        return found

    def read(self, index: int) -> Sample:
        return self.read_many([index])[0]

    def read_many(self, indices: Sequence[int]) -> list[Sample]:
        rows = self._data[list(indices)]
        images, labels = rows[self._image].to_pylist(), rows[self._label].to_pylist()
        return [
            (self._file(image), self._number(label), self.key(index))
            for index, image, label in zip(indices, images, labels, strict=True)
        ]

    def all_labels(self) -> np.ndarray:
        """As Source's, of the column of labels alone; no image is read."""
        columns = (batch.column(self._label).to_pylist() for batch in self._data.data.to_batches())
        numbers = (self._number(label) for column in columns for label in column)
        return np.fromiter((one if isinstance(one, int) else -1 for one in numbers), np.int64, len(self))

    def count_labels_from(self, bound: int) -> int:
        if self._numbers is not None:
            return 0
        import pyarrow.compute as pc

        count = 0
        for batch in self._data.data.to_batches():
            labels = batch.column(self._label)
            if self.multi_label:
                above = pc.greater_equal(pc.list_flatten(labels), bound)
                count += len(pc.unique(pc.list_parent_indices(labels).filter(above)))
            else:
                count += pc.sum(pc.greater_equal(labels, bound)).as_py() or 0
        return count

    def digest(self) -> str:
        """Of the labels and of the sizes of the images as files; the images are not read."""
        import pyarrow.compute as pc

        sizes, labels = (hashlib.blake2b(digest_size=16) for _ in range(2))
        for batch in self._data.data.to_batches():
            images = batch.column(self._image)
            stored = images.field("bytes") if hasattr(images, "field") else images
            sizes.update(
                pc.fill_null(pc.binary_length(stored), -1).to_numpy(zero_copy_only=False).astype("<i8").tobytes()
            )
            labels.update("".join(f"{label}\n" for label in batch.column(self._label).to_pylist()).encode())
        found = (len(self), self.multi_label, list(self.class_names), sizes.hexdigest(), labels.hexdigest())
        return hashlib.blake2b(repr(found).encode(), digest_size=16).hexdigest()

    def _file(self, image: Any) -> bytes:
        """The encoded image that a row holds or names."""
        if not isinstance(image, dict):
            return image or b""
        if image["bytes"] is None and image.get("path"):
            return read_file(os.path.join(self._root, image["path"]))
        return image["bytes"] or b""

    def _number(self, label: Any) -> Label | Unusable:
        """The class or classes of a stored label."""
        if label is None:
            return Unusable("no label")
        if self._numbers is not None:
            return (
                _all_or_why([self._numbers.of(name) for name in label]) if self.multi_label else self._numbers.of(label)
            )
        return _all_or_why(label) if self.multi_label else label


def _all_or_why(labels: Sequence[int | Unusable | None]) -> list[int] | Unusable:
    numbers = [label for label in labels if isinstance(label, int)]
    if len(numbers) == len(labels):
        return numbers
    return next((label for label in labels if isinstance(label, Unusable)), Unusable("a list of labels with a gap"))


def _chosen_split(splits: Iterable[str | None], wanted: str | None, role: str) -> str | None:
    """The split that the run file names, or that of the role; None where a data set is not split."""
    names = [name for name in splits if name is not None]
    if not names and wanted is None:
        return None
    if not names:
        raise UserError(f"vitds.data.{role}.split: {wanted!r} is not known; the data set is not split, leave it away")
    if wanted is None:
        wanted = next((name for name in SPLITS[role] if name in names), None)
        if wanted is None:
            raise UserError(
                f"vitds.data.{role}.split: missing; the data set has no split {' or '.join(SPLITS[role])}, "
                f"it has {', '.join(names)}"
            )
    if wanted not in names:
        raise UserError(one_of(f"vitds.data.{role}.split", wanted, names))
    return wanted


def _image_column(data: Dataset, wanted: str | None, place: str) -> str:
    import datasets
    import pyarrow.types as types

    if wanted is not None:
        if wanted not in data.column_names:
            raise UserError(one_of(place, wanted, data.column_names))
        stored = data.data.schema.field(wanted).type
        if types.is_struct(stored) and stored.get_field_index("bytes") >= 0:
            stored = stored.field("bytes").type
        if not (types.is_binary(stored) or types.is_large_binary(stored)):
            raise UserError(f"{place}: column {wanted!r} holds {stored}; expected images as the bytes of files")
        return wanted
    found = [name for name, feature in data.features.items() if isinstance(feature, datasets.Image)]
    if len(found) != 1:
        what = f"{len(found)} columns are of the feature Image" if found else "no column is of the feature Image"
        raise UserError(f"{place}: missing; {what}; columns: {', '.join(data.column_names)}")
    return found[0]


def _label_column(data: Dataset, wanted: str | None, place: str) -> str:
    if wanted is None:
        wanted = next((name for name in LABELS if name in data.column_names), None)
        if wanted is None:
            raise UserError(f"{place}: missing; no column {', '.join(LABELS)}; columns: {', '.join(data.column_names)}")
    if wanted not in data.column_names:
        raise UserError(one_of(place, wanted, data.column_names))
    return wanted


def _label_kind(data: Dataset, column: str, place: str) -> tuple[bool, bool, list[str]]:
    """(whether each label is a list, whether labels are words, the class names that the data set brings)."""
    import pyarrow.types as types

    stored, feature = data.data.schema.field(column).type, data.features[column]
    is_list = types.is_list(stored) or types.is_large_list(stored) or types.is_fixed_size_list(stored)
    if is_list:
        stored, feature = stored.value_type, getattr(feature, "feature", None)
    words = types.is_string(stored) or types.is_large_string(stored)
    if not (words or types.is_integer(stored)):
        raise UserError(f"{place}: column {column!r} holds {stored}; expected classes as whole numbers or words")
    return is_list, words, list(getattr(feature, "names", None) or ())
