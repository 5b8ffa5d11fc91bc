"""`vitds check`: a run file, looked at as the trainer would, without starting anything."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from vitds.config import load_run_file, prepare
from vitds.planning.devices import device
from vitds.planning.refusal import refuse_what_cannot_fit
from vitds.planning.workload import workload_of


def add_verb(verbs: Any) -> None:
    """Add `check` to the parser's verbs."""
    check = verbs.add_parser("check", help="check a run file as the trainer would, without starting anything")
    check.add_argument("--config", required=True)
    check.add_argument("--gpus", type=int, default=1, help="number of ranks to check the batch arithmetic for")
    check.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    check.add_argument("--device", metavar="NAME", help="refuse what plainly does not fit it; see vitds plan")


def run(options: argparse.Namespace) -> int:
    """Print the resolved run file.

    Raises:
        UserError: what is wrong with it.
    """
    run = load_run_file(options.config, options.set, world_size=options.gpus)
    plan = prepare(run)
    if options.device is not None:
        named = device(options.device, options.gpus)
        refuse_what_cannot_fit(workload_of(run, named.kind), options.gpus, named.memory_bytes, named.name)
    print(json.dumps(run.resolved, indent=2, ensure_ascii=False))
    if plan.start:
        print("; ".join(plan.start), file=sys.stderr)
    print(
        f"{options.gpus} rank(s) × {run.micro_batch} images × {run.accumulation} micro batches = {run.global_batch} a step",
        file=sys.stderr,
    )
    return 0
