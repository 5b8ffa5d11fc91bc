"""What runs of one run file ended with, side by side: benchmarks/finetune.py RUN… (those that are not there are passed over).

`make finetune` and `make finetune-scratch` end with it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vitds.json_files import read_object
from vitds.metrics import read_metrics

FIGURES = ("eval/top1", "eval_ema/top1", "minival/top1", "eval/loss")


def row(run: Path) -> list[str]:
    """Name, origin, steps and the last figures of a run's directory."""
    last = next(row for row in reversed(read_metrics(run)) if FIGURES[0] in row)
    start = read_object(run / "config.json")["vitds"].get("init_from")
    figures = [f"{last[name]:.4f}" if name in last else "" for name in FIGURES]
    return [str(run), start["path"] if start else "from scratch", str(last["step"]), *figures]


def main(runs: list[Path]) -> None:
    table = [["run", "from", "steps", *FIGURES], *(row(run) for run in runs if (run / "metrics.jsonl").exists())]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
