"""A folder of class folders of image files, as ImageNet is usually unpacked: PATH/CLASS/IMAGE."""

from __future__ import annotations

import bisect
import hashlib
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from vitds.data.source import Sample, Source
from vitds.data.storage import read_file
from vitds.errors import UserError

if TYPE_CHECKING:
    from vitds.data.section import SourceSection

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Folder(Source):
    """Images listed once, classes and files in order of their names, so that every rank lists them alike.

    Names that start with a dot are passed over. The listing is held as one block of bytes and an array of offsets:
    millions of Python strings would be copied into every worker as their reference counts change.
    """

    keys: ClassVar[tuple[str, ...]] = ("path",)

    def __init__(self, section: SourceSection, role: str) -> None:
        place = f"vitds.data.{role}.path"
        if section.path is None:
            raise UserError(f"{place}: missing; source 'folder' needs the folder that holds one folder per class")
        self.root = os.path.abspath(os.path.expanduser(section.path))
        try:
            self.class_names, files = _list_classes(self.root, place)
        except OSError as error:
            raise UserError(f"{place}: cannot list {error.filename!r}: {error.strerror}") from error
        names = [os.fsencode(name) for in_class in files for name in in_class]
        self.names = b"".join(names)
        self.offsets = np.cumsum([0, *map(len, names)], dtype=np.int64)
        self.labels = np.repeat(np.arange(len(files), dtype=np.int32), [len(in_class) for in_class in files])

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, index: int) -> str:
        return f"{self.class_names[self.labels[index]]}/{self._name(index)}"

    def _name(self, index: int) -> str:
        return os.fsdecode(self.names[self.offsets[index] : self.offsets[index + 1]])

    def find(self, keys: Iterable[str]) -> dict[str, int]:
        label_of = {name: label for label, name in enumerate(self.class_names)}
        ends = np.searchsorted(self.labels, np.arange(len(self.class_names) + 1))
        found = {}
        for key in set(keys):
            class_name, _, name = key.partition("/")
            if (label := label_of.get(class_name)) is not None:
                end = int(ends[label + 1])
                index = bisect.bisect_left(range(end), name, lo=int(ends[label]), key=self._name)
                if index < end and self._name(index) == name:
                    found[key] = index
        return found

    def read(self, index: int) -> Sample:
        key = self.key(index)
        return read_file(os.path.join(self.root, key)), self.label(index), key

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def all_labels(self) -> np.ndarray:
        return self.labels.astype(np.int64)

    def digest(self) -> str:
        """Of all names; what the files hold is not looked at."""
        found = hashlib.blake2b(repr(self.class_names).encode(), digest_size=16)
        for part in (self.names, self.offsets.tobytes(), self.labels.tobytes()):
            found.update(part)
        return found.hexdigest()


def _list_classes(root: str, place: str) -> tuple[list[str], list[list[str]]]:
    """Class names and each class's file names, all sorted."""
    if not os.path.isdir(root):
        raise UserError(f"{place}: {root!r} is {'not a folder' if os.path.exists(root) else 'not there'}")
    with os.scandir(root) as entries:
        found = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    classes = [name for name, is_folder in found if is_folder]
    if not classes:
        images = sum(name.lower().endswith(EXTENSIONS) for name, _ in found)
        what = f"{images} images but no class folders" if images else "no class folders" if found else "nothing"
        raise UserError(f"{place}: {root!r} holds {what}; expected one folder per class, with the class's images in it")
    files = []
    for name in classes:
        with os.scandir(os.path.join(root, name)) as entries:
            files.append(sorted(entry.name for entry in entries if _is_image(entry.name)))
    empty = [name for name, in_class in zip(classes, files, strict=True) if not in_class]
    if empty:
        listed = ", ".join(repr(name) for name in empty[:5]) + (", …" if len(empty) > 5 else "")
        raise UserError(
            f"{place}: {len(empty)} of {len(classes)} class folders of {root!r} hold no image "
            f"({', '.join(EXTENSIONS)}): {listed}"
        )
    return classes, files


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")
