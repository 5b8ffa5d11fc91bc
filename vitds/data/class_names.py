"""Names of classes, where a source's labels are words."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from vitds.data.images import Unusable
from vitds.errors import UserError, nearest


def read_class_names(path: str, place: str) -> list[str]:
    """The names in a file, one a line or one JSON list, by number; `place` is the file's key in the run file.

    Raises:
        UserError: no such file, no list of names, none in it, or one that is there twice.
    """
    path = os.path.abspath(os.path.expanduser(path))
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        names = json.loads(text) if text.lstrip().startswith(("[", "{")) else text.splitlines()
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{place}: {path!r} cannot be read: {reason}") from error
    if not isinstance(names, list):
        raise UserError(f"{place}: {path!r} is to list names in the order of their numbers, and holds a JSON object")
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise UserError(f"{place}: {path!r} is to list names, and holds {wrong[0]!r}")
    names = [name.strip() for name in names]
    while names and not names[-1]:
        names.pop()
    if not names:
        raise UserError(f"{place}: {path!r} names no class; expected one name a line, or a JSON list of names")
    number: dict[str, int] = {}
    for i, name in enumerate(names):
        if not name:
            raise UserError(f"{place}: {path!r} has no name for class {i}")
        if name in number:
            raise UserError(f"{place}: {path!r} gives {name!r} to class {number[name]} and again to class {i}")
        number[name] = i
    return names


class ClassNumbers:
    """The numbers of classes by name."""

    def __init__(self, names: Sequence[str]) -> None:
        self._numbers = {name: number for number, name in enumerate(names)}

    def __contains__(self, name: str) -> bool:
        return name in self._numbers

    def of(self, name: str) -> int | Unusable:
        """The class called `name`, or why there is none."""
        number = self._numbers.get(name)
        if number is None:
            return Unusable(
                f"label {name!r} is not one of the {len(self._numbers)} classes{nearest(name, self._numbers)}"
            )
        return number
