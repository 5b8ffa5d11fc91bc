"""What a tar says of its images: which of its files belong together, and which classes they name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vitds.data.images import Unusable
from vitds.data.tar.members import Member, Members

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp")
LABELS = ("cls", "json", "txt")
"""The first that an image has counts, but JSON without one of `LABEL_KEYS` is passed over."""
LABEL_KEYS = ("label", "labels", "cls")
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")

Stated = int | str | list[int] | list[str]
"""A label as it is written: numbers or names of classes."""


@dataclass
class Labelled:
    """An image with its label, or why it has none."""

    key: bytes
    image: Member
    label: Stated | Unusable


@dataclass
class _Group:
    key: bytes
    images: list[Member] = field(default_factory=list)
    labels: dict[str, bytes] = field(default_factory=dict)
    twice: str = ""
    """An extension of which there are two labels."""


def labelled(members: Members, label_key: str | None) -> Iterator[Labelled]:
    """The images of a tar in order, each with its label, as WebDataset puts files together.

    The key of a file is its path up to the first dot of its last part; the rest, in lower case, is its extension.
    Neighbours of one key belong together. An image of a key that has more than one, or has been before, has no label.
    """
    seen: set[bytes] = set()
    for group in _groups(members):
        if not group.images:
            continue
        label: Stated | Unusable
        if group.key in seen:
            label = Unusable("an image of this key has been before")
        elif len(group.images) > 1:
            label = Unusable(f"{len(group.images)} images of one key")
        elif group.twice:
            label = Unusable(f"two .{group.twice} of one key")
        else:
            label = label_of(group.labels, label_key)
        seen.add(group.key)
        yield Labelled(group.key, group.images[0], label)


def _groups(members: Members) -> Iterator[_Group]:
    group = _Group(b"")
    for member in members:
        folder, slash, name = member.name.rpartition(b"/")
        stem, _, rest = name.partition(b".")
        if not stem or not rest:
            continue
        key, extension = folder + slash + stem, rest.decode(errors="replace").lower()
        if key != group.key:
            yield group
            group = _Group(key)
        if extension in IMAGES:
            group.images.append(member)
        elif extension in LABELS:
            group.twice = extension if extension in group.labels else group.twice
            group.labels[extension] = members.bytes_of(member)
    yield group


def label_of(files: Mapping[str, bytes], label_key: str | None) -> Stated | Unusable:
    """The label in these files, by extension.

    - `.cls`: an integer.
    - `.json`: an object with a label under `label_key`, and then nothing but JSON is looked at, or under the first of
      `LABEL_KEYS` that it has: an integer, a class name or a list of either.
    - `.txt`: integers with blanks or commas between them, or class names, one a line; two or more are a list.
    """
    if label_key is not None:
        files = {"json": files["json"]} if "json" in files else {}
    try:
        if "cls" in files:
            text = files["cls"].decode().strip()
            return int(text) if _INTEGER.fullmatch(text) else Unusable(f".cls holds {_short(text)}, not an integer")
        if "json" in files:
            given = json.loads(files["json"])
            if not isinstance(given, dict):
                return Unusable(f".json holds {_short(given)}, not an object")
            key = label_key if label_key is not None else next((key for key in LABEL_KEYS if key in given), None)
            if key is not None:
                return _json_label(given[key]) if key in given else Unusable(f".json has no {key!r}")
        if "txt" in files:
            return _text_label(files["txt"].decode())
    except ValueError as error:  # neither UTF-8 nor JSON
        return Unusable(f"its label cannot be read: {error}")
    except RecursionError:
        return Unusable("its label cannot be read: JSON nested too deep")
    return Unusable(f"no label: no .json with {label_key!r} beside it" if label_key else "no label beside it")


def _json_label(value: Any) -> Stated | Unusable:
    if isinstance(value, (int, str)) and not isinstance(value, bool) and value != "":
        return value
    if isinstance(value, list):
        for kind in (int, str):
            if all(isinstance(one, kind) and not isinstance(one, bool) and one != "" for one in value):
                return value
    return Unusable(f".json has the label {_short(value)}; expected an integer, a class name or a list of either")


def _text_label(text: str) -> Stated | Unusable:
    words = re.split(r"[\s,]+", text.strip(" \t\r\n,"))
    if all(map(_INTEGER.fullmatch, words)):
        numbers = [int(word) for word in words]
        return numbers if len(numbers) > 1 else numbers[0]
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        return Unusable(".txt is empty")
    return names if len(names) > 1 else names[0]


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "…"
