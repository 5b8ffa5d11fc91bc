"""Sections of the run file as typed, strict dataclasses.

Each part of vitds owns one section: a dataclass whose fields are made with `key(default, "one sentence", …)`. `parse`
turns JSON into it and refuses whatever it does not know; docs/config.md is generated from the same fields.
A field of type `Duration` named `total` is written in JSON as exactly one of `total_steps`, `total_images`,
`total_epochs` or `total_percent`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

from vitds.errors import UserError, nearest, one_of

Section = TypeVar("Section")
UNITS = ("steps", "images", "epochs", "percent")


@dataclass(frozen=True)
class Duration:
    """A length of training as the user wrote it; `to_steps` is the only way to use it."""

    value: float
    unit: str = "steps"

    def to_steps(
        self, *, global_batch: int, images_per_epoch: int | None = None, total_steps: int | None = None
    ) -> int:
        """Optimizer steps: max(1, round(x)); 0 stays 0.

        Raises:
            UserError: epochs without a data set of known size, or percent without a total.
        """
        if self.value == 0:
            return 0
        if self.unit == "steps":
            steps = self.value
        elif self.unit == "images":
            steps = self.value / global_batch
        elif self.unit == "epochs":
            if images_per_epoch is None:
                raise UserError("a duration in epochs needs a training set of known size; write it in steps or images")
            steps = self.value * images_per_epoch / global_batch
        else:
            if total_steps is None:
                raise UserError(
                    "a duration in percent needs a total; write the total itself in steps, images or epochs"
                )
            steps = self.value / 100 * total_steps
        return max(1, round(steps))


def key(default: Any = dataclasses.MISSING, doc: str = "", *, choices: typing.Iterable[Any] | None = None) -> Any:
    """A field of a section: its default (none: required), one sentence of meaning, and the values allowed."""
    metadata = {"doc": doc, "choices": tuple(choices) if choices is not None else None}
    if isinstance(default, (dict, list)) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def json_names(field: dataclasses.Field[Any], hint: Any) -> list[str]:
    """The JSON keys that can set a field."""
    return [f"{field.name}_{unit}" for unit in UNITS] if _is_duration(hint) else [field.name]


def parse(cls: type[Section], given: Any, path: str) -> Section:
    """A section from parsed JSON.

    Args:
        cls: the section's dataclass.
        given: the JSON value found at `path`.
        path: where it stands, "vitds.model"; named in every error.

    Raises:
        UserError: unknown key, missing key, wrong type, value not allowed, a duration given twice or not at all.
    """
    if not isinstance(given, dict):
        raise UserError(f"{path}: expected an object, found {given!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    known = [name for field in fields.values() for name in json_names(field, hints[field.name])]
    for word in given:
        if word not in known:
            raise UserError(f"{path}.{word}: unknown key{nearest(word, known)}; allowed: {', '.join(known)}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        hint = hints[name]
        present = [word for word in json_names(field, hint) if word in given]
        if len(present) > 1:
            raise UserError(f"{path}: {' and '.join(present)} are two lengths of one thing; give exactly one")
        if not present:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise UserError(
                    f"{path}.{' | '.join(json_names(field, hint))}: missing; {field.metadata.get('doc', '')}"
                )
            continue
        word, place = present[0], f"{path}.{present[0]}"
        if _is_duration(hint):
            values[name] = _duration(given[word], word.rsplit("_", 1)[1], place)
            continue
        values[name] = typed(given[word], hint, place)
        choices = field.metadata.get("choices")
        if choices is not None and values[name] is not None and values[name] not in choices:
            raise UserError(one_of(place, values[name], choices))
    return cls(**values)


def check_least(path: str, section: Any, **least: float) -> None:
    """Refuse numbers below the least allowed one, given by name; None passes."""
    for name, bound in least.items():
        value = getattr(section, name)
        if value is not None and value < bound:
            raise UserError(f"{path}.{name}: expected at least {bound}, found {value}")


def to_json(section: Any) -> dict[str, Any]:
    """The section as JSON that `parse` reads back to an equal one; every key explicit."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if isinstance(value, Duration):
            out[f"{field.name}_{value.unit}"] = value.value
        elif value is not None:
            out[field.name] = _to_json(value)
    return out


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_json(value)
    if isinstance(value, dict):
        return {word: _to_json(item) for word, item in value.items()}
    return [_to_json(item) for item in value] if isinstance(value, list) else value


def _is_duration(hint: Any) -> bool:
    return hint is Duration or Duration in typing.get_args(hint)


def _duration(value: Any, unit: str, place: str) -> Duration:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise UserError(f"{place}: expected a number of {unit} ≥ 0, found {value!r}")
    if unit == "steps" and value != int(value):
        raise UserError(f"{place}: steps are whole, found {value!r}")
    return Duration(value, unit)


def typed(value: Any, hint: Any, place: str) -> Any:
    """`value` checked against a type hint: JSON scalars, list[...], dict, nested sections, unions of these."""
    if hint is Any:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        errors = []
        for option in arguments:
            if option is type(None):
                continue
            try:
                return typed(value, option, place)
            except UserError as error:
                errors.append(error)
        sections = [option for option in arguments if dataclasses.is_dataclass(option)]
        if isinstance(value, dict) and sections:
            raise errors[arguments.index(sections[0])]
        raise UserError(f"{place}: expected {_name(hint)}, found {value!r}")
    if dataclasses.is_dataclass(hint):
        return parse(hint, value, place)  # type: ignore[arg-type]
    if origin is list or hint is list:
        if not isinstance(value, list):
            raise UserError(f"{place}: expected a list, found {value!r}")
        return [typed(item, arguments[0], f"{place}[{i}]") for i, item in enumerate(value)] if arguments else value
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise UserError(f"{place}: expected an object, found {value!r}")
        return (
            {word: typed(item, arguments[1], f"{place}.{word}") for word, item in value.items()} if arguments else value
        )
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{place}: expected {_name(hint)}, found {value!r}")
    return value


def _name(hint: Any) -> str:
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a string",
        dict: "an object",
        list: "a list",
    }
    if dataclasses.is_dataclass(hint):
        return words[dict]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_name(option) for option in typing.get_args(hint) if option is not type(None))
    return words.get(typing.get_origin(hint) or hint, getattr(hint, "__name__", str(hint)))
