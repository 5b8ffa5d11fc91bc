"""`vitds …`: small verbs around a run. Training itself is `deepspeed launcher/train.py`."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from typing import Any

from vitds.errors import UserError, nearest, one_of

VERBS = {
    "check": "vitds.check", "plan": "vitds.planning.verbs", "shapes": "vitds.planning.shapes_verb",
    "run": "vitds.cluster.supervise.supervisor", "hostfile": "vitds.cluster.schedulers", "doctor": "vitds.cluster.doctor.verb",
    "checkpoint": "vitds.checkpoint.verbs", "convert": "vitds.checkpoint.exchange.convert", "data": "vitds.data_verbs.verbs",
    "evaluate": "vitds.inference.evaluate", "predict": "vitds.inference.predict",
    "fewshot": "vitds.inference.fewshot", "embed": "vitds.inference.embed", "neighbours": "vitds.inference.neighbours",
    "config-docs": "vitds.config_docs",
}  # fmt: skip
"""Where each lives: a module with `add_verb(verbs)` and `run(options)`, imported when it is asked for. Half of them need
neither torch nor DeepSpeed, whose import takes seconds."""

READING = ("doctor", "plan", "shapes", "data", "evaluate", "fewshot", "embed")
"""Those that read run files, from a floor below the one where that is done: `run(options, load)`."""


WRITING = ("convert", "embed")
"""Those that write gigabytes under a temporary name: a SIGTERM ends them as Ctrl-C does, and nothing of it is left."""


class _Verbs(argparse.ArgumentParser):
    """Says of which verb an option is unknown, and which one is nearest."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            self.error(f"unknown argument: {unknown[0]}{nearest(unknown[0].partition('=')[0], options)}")
        return found, unknown


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 2 where the user's input is wrong, else what the verb says."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and not arguments[0].startswith("-") and arguments[0] not in VERBS:
        print(f"vitds: {one_of('verb', arguments[0], VERBS)}", file=sys.stderr)
        return 2
    asked = arguments[:1] if arguments and arguments[0] in VERBS else [*VERBS]
    rooms: dict[str, Any] = {name: importlib.import_module(VERBS[name]) for name in asked}
    parser = _Verbs(prog="vitds", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for room in rooms.values():
        room.add_verb(verbs)
    options = parser.parse_args(arguments)
    if options.verb != "run":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `vitds … | head` ends quietly
    if options.verb in WRITING:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return int(rooms[options.verb].run(options, *([_load] if options.verb in READING else [])))
    except UserError as error:
        print(f"vitds: {error}", file=sys.stderr)
        return 2


def _load(path: str, overrides: list[str], world_size: int | None) -> Any:
    from vitds.config import load_run_file

    return load_run_file(path, overrides, world_size=world_size)


if __name__ == "__main__":
    sys.exit(main())
