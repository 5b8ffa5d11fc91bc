"""Images/s, MFU and peak memory of training steps of a run file, beside peers of the same shape on the same device.

    python benchmarks/step.py --config ds_configs/digits.json [--set a.b=c …] [--trainees ours torch siglip-deepspeed]
    python benchmarks/step.py --config … --search 16:256 --sweep checkpointing=none,every:2,full compile=false,true

Each trainee (benchmarks/trainees.py) is a process of its own; ours is built as the trainer builds it. On a CPU all are
alive at once and take turns, round by round; on a GPU one is started for each turn, so that it has the whole device.
--search doubles the micro batch from FIRST until it does not fit (or MOST), for every trainee, and compares each at its
best. MFU counts model FLOPs alone: what checkpointing computes again does not count.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass

from children import Child, script
from runner import Candidate, Column, Failed, Row, Table, compare, reason, report
from trainees import TRAINEES, synthetic

from vitds import dist
from vitds.config import load_run_file

COLUMNS = (
    Column("images/s", "images/s", ".1f"), Column("seconds", "ms/step", ".1f", 1000), Column("mfu", "MFU %", ".1f", 100),
    Column("memory", "GiB", ".2f"), Column("micro", "micro", ".0f"), Column("loss", "loss", ".3g"),
)  # fmt: skip
SHORT = {
    "checkpointing": "vitds.train.activation_checkpointing", "compile": "vitds.train.compile",
    "mode": "vitds.train.compile_mode", "attention": "vitds.train.attention", "stage": "zero_optimization.stage",
    "accumulate": "data_types.grad_accum_dtype",
}  # fmt: skip
"""Words for keys in --sweep; any key of the run file can be given whole."""


@dataclass
class Trainee:
    """One candidate: which, under what name, with which overrides beside everybody's."""

    name: str
    kind: str
    sets: list[str]
    micro: int


class Bench:
    """Asks trainees, alive or started for the turn."""

    def __init__(self, options: argparse.Namespace, sets: list[str]) -> None:
        self.options, self.sets = options, sets
        self.alive: dict[str, Child] = {}

    def start(self, trainee: Trainee, micro: int) -> Child:
        options = self.options
        sizes = [
            f"train_batch_size={micro * options.accumulation * options.ranks}", f"train_micro_batch_size_per_gpu={micro}"
        ]  # fmt: skip
        words = [script("trainees.py"), trainee.kind, options.config, json.dumps([*self.sets, *trainee.sets, *sizes])]
        words += ["--images", options.images, *(["--threads", str(options.threads)] if options.threads else [])]
        return Child(words, options.ranks, options.timeout)

    def turn(self, trainee: Trainee) -> dict[str, float]:
        """One turn at the trainee's micro batch."""
        question = {"micro": trainee.micro, "steps": self.options.steps}
        if self.options.apart:
            child = self.start(trainee, trainee.micro)
            try:
                return child.ask(warmup=self.options.warmup, **question)
            finally:
                child.end()
        if trainee.name not in self.alive:
            self.alive[trainee.name] = self.start(trainee, trainee.micro)
            return self.alive[trainee.name].ask(warmup=self.options.warmup, **question)
        return self.alive[trainee.name].ask(warmup=1, **question)

    def search(self, trainee: Trainee, first: int, most: int, rows: list[Row]) -> None:
        """Every micro batch tried, up to the first that does not fit, is added to `rows`, also where its time ends amid them;
        the fastest of `rows` becomes the trainee's."""
        micro = first
        child = self.start(trainee, first)
        try:
            while micro <= most:
                rows.append(self.tried(child, trainee, micro))
                if rows[-1].error is not None:
                    break
                micro *= 2
        finally:
            child.end()
            fitting = [row.figures for row in rows if row.error is None]
            if fitting:
                trainee.micro = int(max(fitting, key=lambda figures: figures["images/s"])["micro"])
        if self.options.refine and first < most and fitting and rows[-1].error is not None and micro % 4 == 0:
            # Between the last that fitted and the first that did not there is one more worth a try.
            self.search(trainee, 3 * micro // 4, 3 * micro // 4, rows)

    def tried(self, child: Child, trainee: Trainee, micro: int) -> Row:
        """One micro batch in a living child."""
        row = Row(f"{trainee.name}, micro batch {micro}")
        try:
            row.figures = child.ask(micro=micro, warmup=self.options.warmup, steps=self.options.steps)
            row.rounds = [row.figures]
        except Failed as error:
            row.error = reason(error)
        print("  " + Table("", COLUMNS, [row]).text().splitlines()[-1], flush=True)
        return row


def swept(words: list[str]) -> list[tuple[str, list[str]]]:
    """(name, overrides) of every combination of KEY=V1,V2 …"""
    keys = [(key, values.split(",")) for key, _, values in (word.partition("=") for word in words)]
    found = []
    for values in itertools.product(*(values for _, values in keys)):
        pairs = [(key, value) for (key, _), value in zip(keys, values, strict=True)]
        found.append((" ".join(f"{k}={v}" for k, v in pairs), [f"{SHORT.get(k, k)}={v}" for k, v in pairs]))
    return found


def tables_of(options: argparse.Namespace) -> list[Table]:
    """The search, if one is asked for, and the comparison."""
    bench = Bench(options, synthetic(options.config, options.set) if options.images == "device" else options.set)
    micro = options.micro or load_run_file(options.config, options.set, world_size=None).micro_batch
    trainees = [
        Trainee(f"{kind} {name}".strip(), kind, sets, micro)
        for kind in options.trainees
        for name, sets in (swept(options.sweep) if kind == "ours" and options.sweep else [("", [])])
    ]
    what = f"{options.config} {' '.join(options.set)}".strip()
    where = f"{options.ranks} rank(s), {options.accumulation} micro batch(es) a step, images from the {options.images}"
    tables, searched = [], dict[str, list[Row]]()
    if options.search:
        first, _, most = options.search.partition(":")
        for trainee in trainees:
            searched[trainee.name] = []
        try:
            for trainee in trainees:
                bench.search(trainee, int(first), int(most or 2**20), searched[trainee.name])
        except KeyboardInterrupt:  # its time is over: what is there is compared, what is not says so
            for name, rows in searched.items():
                rows += [] if rows else [Row(name, error="no time was left")]
        tables.append(
            Table(f"search of the micro batch: {what}", COLUMNS, [row for r in searched.values() for row in r])
        )
    names = [trainee.name for trainee in trainees]
    baseline = options.baseline if options.baseline in names else next(reversed(names), None)

    def candidate(trainee: Trainee) -> Candidate:
        found, other = searched.get(trainee.name, []), baseline if trainee.name != baseline else None
        if found and (all(row.error for row in found) or options.rounds == 0):

            def known() -> dict[str, float]:
                best = [row.figures for row in found if row.figures.get("micro") == trainee.micro]
                if not best:
                    raise Failed(found[0].error)
                return best[0]

            return Candidate(trainee.name, known, other)
        return Candidate(trainee.name, lambda: bench.turn(trainee), other)

    try:
        tables.append(
            compare(
                f"training steps: {what}; {where}", [candidate(trainee) for trainee in trainees],
                rounds=options.rounds or 1, warmup=0, by="images/s", columns=COLUMNS,
                say=lambda line: print(f"  {line}", flush=True),
            )
        )  # fmt: skip
    finally:
        for child in bench.alive.values():
            child.end()
    return tables


def main() -> None:
    on_gpu = dist.device().type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--trainees", nargs="+", choices=TRAINEES, default=["ours", "torch", "siglip-deepspeed"])
    parser.add_argument("--baseline", default="torch", help="default: torch, or the last where it is not there")
    parser.add_argument("--micro", type=int, help="micro batch; default: the run file's on one rank")
    parser.add_argument("--search", metavar="FIRST[:MOST]", help="the best micro batch of each")
    parser.add_argument("--refine", action="store_true", help="also try 3/4 of the first micro batch that did not fit")
    parser.add_argument(
        "--sweep", nargs="+", default=[], metavar="KEY=V1,V2", help=f"of ours; {', '.join(SHORT)}, or any"
    )
    parser.add_argument("--accumulation", type=int, default=1, help="micro batches in an optimizer step")
    parser.add_argument("--images", choices=("device", "loader"), default="device")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the first turn's")
    parser.add_argument("--steps", type=int, default=10, help="steps in a turn")
    parser.add_argument("--rounds", type=int, default=2 if on_gpu else 5, help="0: the search's figures are compared")
    parser.add_argument(
        "--apart", action=argparse.BooleanOptionalAction, default=on_gpu, help="a process for each turn"
    )
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--threads", type=int, help="of each rank")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one answer")
    parser.add_argument("--json", default="benchmarks/step.json")
    options = parser.parse_args()
    report(tables_of(options), options.json, dist.device())


if __name__ == "__main__":
    main()
