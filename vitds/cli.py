"""`vitds …`: small verbs around a run. Training itself is `deepspeed launcher/train.py`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import signal
import sys
import typing
from typing import Any, NoReturn

from vitds import dist
from vitds.checkpoint import verbs as checkpoint_verbs
from vitds.cluster import schedulers
from vitds.cluster.doctor import verb as doctor
from vitds.cluster.supervise import supervisor
from vitds.config import RunFile, VitdsSection, load_run_file, prepare
from vitds.data_verbs import verbs as data_verbs
from vitds.errors import UserError, nearest
from vitds.metrics import MonitorSections, Window
from vitds.planning import shapes_verb
from vitds.planning import verbs as planning_verbs
from vitds.schedules import SCHEDULES
from vitds.sections import json_names, to_json


class _Arguments(argparse.ArgumentParser):
    """Mistakes on the command line are the user's like any other: one message from one rank, exit code 2."""

    def error(self, message: str) -> NoReturn:
        if re.search("unrecognized arguments:.*=", message):
            message += (
                "\n(A shell may have taken a value of --set apart: DeepSpeed hands arguments to the other hosts' shells "
                "bare. Put values with braces, quotes or blanks into the run file.)"
            )
        raise UserError(f"{message}\n{self.format_usage().strip()}")


class _Verbs(argparse.ArgumentParser):
    """Says of which verb an option is unknown, and which one is nearest."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            self.error(f"unknown argument: {unknown[0]}{nearest(unknown[0].partition('=')[0], options)}")
        return found, unknown


def training_arguments(description: str | None) -> argparse.Namespace:
    """The command line of launcher/train.py.

    Raises:
        UserError: an unknown or missing argument.
    """
    parser = _Arguments(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="run file: DeepSpeed's keys and a section vitds")
    parser.add_argument("--output-dir", required=True, help="directory of this run: checkpoints, metrics, events")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in vitds.train.seed=1")
    parser.add_argument("--profile", type=Window.parse, default=Window(), metavar="FIRST:COUNT[:RANKS]",
                        help="trace COUNT steps from step FIRST on, on rank 0 or RANKS, and say where their time went")  # fmt: skip
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    options = parser.parse_args()
    options.profile.check_ranks(dist.world_size())
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 2 where the user's input is wrong, else what the verb says."""
    parser = _Verbs(prog="vitds", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    check = verbs.add_parser("check", help="check a run file as the trainer would, without starting anything")
    check.add_argument("--config", required=True)
    check.add_argument("--gpus", type=int, default=1, help="number of ranks to check the batch arithmetic for")
    check.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    verbs.add_parser("config-docs", help="print docs/config.md, made from the sections themselves")
    for room in (supervisor, schedulers, doctor, planning_verbs, shapes_verb):
        room.add_verb(verbs)
    checkpoint_verbs.add_verbs(verbs)
    data_verbs.add_verbs(verbs)
    options = parser.parse_args(arguments)
    if options.verb != "run":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `vitds … | head` ends quietly
    if options.verb == "config-docs":
        print(config_docs())
        return 0
    try:
        if options.verb == "checkpoint":
            return checkpoint_verbs.run(options)
        if options.verb == "data":
            return data_verbs.run(options, load_run_file)
        if options.verb == "run":
            return supervisor.run(options)
        if options.verb == "hostfile":
            return schedulers.run(options)
        if options.verb == "doctor":
            return doctor.run(options, _load)
        if options.verb == "plan":
            return planning_verbs.run(options, load_run_file)
        if options.verb == "shapes":
            return shapes_verb.run(options, load_run_file)
        run = load_run_file(options.config, options.set, world_size=options.gpus)
        prepare(run)
    except UserError as error:
        print(f"vitds: {error}", file=sys.stderr)
        return 2
    print(json.dumps(run.resolved, indent=2, ensure_ascii=False))
    print(
        f"{options.gpus} rank(s) × {run.micro_batch} images × {run.accumulation} micro batches = {run.global_batch} a step",
        file=sys.stderr,
    )
    return 0


def _load(config: str, overrides: list[str], world_size: int) -> RunFile:
    return load_run_file(config, overrides, world_size=world_size)


def config_docs() -> str:
    """The reference of all keys of the run file that are ours, as Markdown."""
    lines = [
        "# The run file",
        "",
        "DeepSpeed's keys stand at the top level, in DeepSpeed's words; what follows is read by vitds. Made by `make docs` from the",
        "sections' own dataclasses. A length may be written in steps, images, epochs or percent of the run, exactly one of them.",
    ]
    lines += _section(VitdsSection, "vitds")
    lines += _section(MonitorSections, "")
    for name, cls in SCHEDULES.items():
        lines += _section(cls, f'scheduler.params of type "{name}"', leaf=True)
    return "\n".join(lines)


def _section(cls: Any, path: str, leaf: bool = False) -> list[str]:
    hints = typing.get_type_hints(cls)
    rows, inner = [], []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        nested = next((option for option in (hint, *typing.get_args(hint)) if _is_section(option)), None)
        if nested is not None:
            inner += _section(nested, f"{path}.{field.name}" if path else field.name)
            continue
        names = json_names(field, hint)
        shown = f"`{names[0]}`" if len(names) == 1 else f"`{field.name}_*`"
        choices = field.metadata.get("choices")
        doc = field.metadata.get("doc", "") + (f" One of {', '.join(map(str, choices))}." if choices else "")
        rows.append(f"| {shown} | {_default(field)} | {doc} |")
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


if __name__ == "__main__":
    sys.exit(main())
