"""`vitds config-docs`: docs/config.md, made from the sections' own dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
import json
import typing
from typing import Any

from vitds.config import VitdsSection
from vitds.metrics import MonitorSections
from vitds.schedules import SCHEDULES
from vitds.sections import json_names, to_json


def add_verb(verbs: Any) -> None:
    """Add `config-docs` to the parser's verbs."""
    verbs.add_parser("config-docs", help="print docs/config.md, made from the sections themselves")


def run(options: argparse.Namespace) -> int:
    """Print it."""
    print(config_docs())
    return 0


def config_docs() -> str:
    """The reference of all keys of the run file that are ours, as Markdown."""
    lines = [
        "# The run file",
        "",
        "DeepSpeed's keys stand at the top level, in DeepSpeed's words; what follows is read by vitds. Made by `make docs` from the",
        "sections' own dataclasses. A length may be written in steps, images, epochs or percent of the run, exactly one of them.",
    ]
    shown: dict[Any, str] = {}
    lines += _section(VitdsSection, "vitds", shown)
    lines += _section(MonitorSections, "", shown)
    for name, cls in SCHEDULES.items():
        lines += _section(cls, f'scheduler.params of type "{name}"', shown, leaf=True)
    return "\n".join(lines)


def _section(cls: Any, path: str, shown: dict[Any, str], leaf: bool = False) -> list[str]:
    """A section's table and those of the sections within it; one that is `shown` at another path is named by that."""
    shown[cls] = path
    hints = typing.get_type_hints(cls)
    rows, inner = [], []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        nested = next((option for option in (hint, *typing.get_args(hint)) if _is_section(option)), None)
        if nested is not None:
            place = f"{path}.{field.name}" if path else field.name
            if typing.get_origin(hint) is dict:
                place += ".NAME"
            if nested in shown:
                rows.append(
                    f"| `{field.name}` | {_default(field)} | {field.metadata['doc']} Keys as in {shown[nested]}. |"
                )
            else:
                inner += _section(nested, place, shown)
            continue
        names = json_names(field, hint)
        word = f"`{names[0]}`" if len(names) == 1 else f"`{field.name}_*`"
        choices = field.metadata.get("choices")
        doc = field.metadata.get("doc", "") + (f" One of {', '.join(map(str, choices))}." if choices else "")
        rows.append(f"| {word} | {_default(field)} | {doc} |")
    summary = (cls.__doc__ or "").strip().splitlines()[0] if leaf or rows else ""
    own = ["", f"## {path}", "", summary, "", "| key | default | meaning |", "|---|---|---|", *rows] if rows else []
    return own + inner


def _is_section(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) and str(getattr(hint, "__name__", "")).endswith("Section")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = to_json(value)
        return f"{fields['value']:g} {fields['unit']}" if "unit" in fields else f"`{json.dumps(fields)}`"
    return "none" if value is None else f"`{json.dumps(value)}`"
