"""JSON on disk: written so that a kill at any point leaves it readable, read so that no mistake in it passes."""

from __future__ import annotations

import json
import math
import os
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from vitds.errors import UserError, nearest


def finite(value: Any) -> Any:
    """`value` with every float that JSON cannot hold (nan, inf) replaced by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write a whole file, durably, so that `path` holds all of `value` or is what it was before."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # what failed first is what is said
            temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one line to a file of JSON lines; it is with the operating system when this returns."""
    line = json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n"
    with open(path, "a+b") as file:
        # A line that a crash tore must not swallow this one.
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            line = "\n" + line
        file.write(line.encode(errors="backslashreplace"))  # names of files need not be UTF-8


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, none if there is no such file; lines that a crash tore are left out.

    Raises:
        UserError: it cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    rows = []
    for line in lines:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


class Expendable:
    """Around a write that a run can do without: where the disk is full, read-only or gone it goes on.

    An OSError ends the block and is said, once until a later block could write again.

    Args:
        what: is written, for the message.
    """

    def __init__(self, what: object) -> None:
        self._what = what
        self._lost = 0

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        if isinstance(error, OSError):
            if not self._lost:
                say(f"vitds: {self._what} cannot be written ({error}); going on")
            self._lost += 1
            return True
        if error is None and self._lost:
            say(f"vitds: {self._what} can be written again; {self._lost} lost")
            self._lost = 0
        return False


def say(text: str) -> None:
    """One message on standard error, if that can be written."""
    with suppress(OSError):  # it may lie on the disk that is in trouble
        print(text, file=sys.stderr, flush=True)


class _Twice(dict[str, Any]):
    """A JSON object in which a key was given twice."""

    key = ""


def read_object(path: Path) -> dict[str, Any]:
    """The file's JSON object; duplicate keys, NaN and syntax errors are refused with their place."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        words = [word for word, _ in items]
        repeated = [word for word in words if words.count(word) > 1]
        if not repeated:
            return dict(items)
        twice = _Twice(items)
        twice.key = repeated[0]
        return twice

    def constant(word: str) -> Any:
        raise UserError(f"{path}: {word} is not JSON; write a number")

    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.json")] if path.parent.is_dir() else []
        where = "is a directory" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {where}{nearest(path.name, siblings)}")
    try:
        given = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(given, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(given).__name__}")
    for place, value in walk(given):
        if isinstance(value, _Twice):
            raise UserError(f"{path}: {(place + '.' if place else '') + value.key}: the key is given twice")
    return given


def walk(value: Any, place: str = "") -> list[tuple[str, Any]]:
    """(dotted place, value) of a JSON value and of everything in it."""
    found = [(place, value)]
    if isinstance(value, dict):
        for word, inner in value.items():
            found += walk(inner, f"{place}.{word}" if place else word)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            found += walk(inner, f"{place}[{i}]")
    return found


def override(given: dict[str, Any], text: str) -> None:
    """Apply one `--set a.b.c=value`."""
    place, equals, raw = text.partition("=")
    if not equals or not all(place.split(".")):
        raise UserError(
            f"--set {text!r}: expected KEY=VALUE with dots between the parts of the key, as in vitds.train.seed=1"
        )
    try:
        value = json.loads(raw)
    except json.JSONDecodeError as error:
        if raw[:1] in ("{", "["):
            raise UserError(
                f"--set {text}: the value is not JSON ({error.msg}); a shell takes the quotes from what is not quoted "
                "itself, and DeepSpeed hands arguments to the other hosts' shells bare: put such a value into the run file"
            ) from error
        value = raw
    *parents, last = place.split(".")
    target: Any = given
    for word in parents:
        target = target.setdefault(word, {})
        if not isinstance(target, dict):
            raise UserError(f"--set {text!r}: {word!r} holds {target!r}, not an object")
    unit = last.rsplit("_", 1)
    if len(unit) == 2 and unit[1] in ("steps", "images", "epochs", "percent") and last not in target:
        # A length has one unit: the new one takes the old one's place.
        for other in ("steps", "images", "epochs", "percent"):
            target.pop(f"{unit[0]}_{other}", None)
    target[last] = value
