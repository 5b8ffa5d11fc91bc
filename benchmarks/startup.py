"""Seconds from the user's command to the first optimizer step, cold and warm, by phases; and the share of a whole run
that is spent in training steps.

    python benchmarks/startup.py [--config ds_configs/digits.json] [--set a.b=c …] [--ranks 2] [--rounds 3]
    python benchmarks/startup.py --share        # the whole run, as `make train` does it (minutes)

What runs is `deepspeed launcher/train.py`, with clocks around a few calls of vitds (this file is the script that the
launcher starts, and runs train.py). Cold: folders of compiled extensions and kernels that are new and empty; what the
page cache holds stays. Phases, of rank 0: launcher (to the start of the rank's interpreter), imports (to the end of what
train.py imports), group (to the ranks' meeting), engine, data (weights, loader and the first batch), step (the first
update), and after the last step the rest of the command.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CLOCK = "VITDS_STARTUP_BEGIN"  # seconds of the monotonic clock, which all processes of a host share
FILE = "VITDS_STARTUP_FILE"
PHASES = ("launcher", "imports", "group", "engine", "data", "step", "first step")


def watched() -> None:
    """In a rank: run the trainer, and note when its parts end."""
    began = float(os.environ[CLOCK])
    marks = {"launcher": time.monotonic() - began}
    steps: list[float] = []
    away: list[float] = []

    import vitds.arguments
    import vitds.checkpoint.state
    import vitds.data
    import vitds.evaluation
    import vitds.zero

    def watch(
        owner: Any, name: str, before: str | None = None, then: Callable[[Any, float], None] | None = None
    ) -> None:
        """Note the time `before` its first call, and tell `then` every call's result and seconds."""
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            start = time.monotonic()
            if before:
                marks.setdefault(before, start - began)
            result = inner(*args, **kwargs)
            if then:
                then(result, time.monotonic() - start)
            return result

        setattr(owner, name, outer)

    def ends(phase: str) -> Callable[[Any, float], None]:
        return lambda *_: marks.setdefault(phase, time.monotonic() - began)

    def stepped(updated: bool, _: float) -> None:
        if updated:
            ends("step")(None, 0)
            steps.append(time.monotonic() - began)

    def aside(_: Any, seconds: float) -> None:
        if steps:
            away.append(seconds)

    def written(*_: Any) -> None:
        spent = [steps[0], steps[-1], len(steps)] if steps else None
        Path(os.environ[FILE]).write_text(json.dumps({"marks": marks, "steps": spent, "away": sum(away)}))

    watch(vitds.arguments, "training_arguments", before="imports")
    watch(vitds.zero, "init_distributed", then=ends("group"))
    watch(vitds.zero.TrainingEngine, "__init__", then=ends("engine"))
    watch(vitds.data.TrainLoader, "__next__", then=ends("data"))
    watch(vitds.zero.TrainingEngine, "step", then=stepped)
    watch(vitds.evaluation.Evaluations, "measure", then=aside)
    watch(vitds.checkpoint.state.RunState, "save", then=aside)
    if os.environ.get("RANK", "0") == "0":
        watch(vitds.checkpoint.state.RunState, "finish", then=written)
    trainer = Path(__file__).resolve().parent.parent / "launcher" / "train.py"
    sys.argv[0] = str(trainer)
    runpy.run_path(str(trainer), run_name="__main__")


class Command:
    """The user's command on this host.

    Args:
        caches: where compiled code lies; None is the user's own places.
        fresh: the caches are emptied first.
    """

    def __init__(
        self, options: argparse.Namespace, sets: list[str], caches: Path | None = None, fresh: bool = False
    ) -> None:
        self.options, self.sets, self.caches, self.fresh = options, sets, caches, fresh

    def __call__(self) -> dict[str, float]:
        """Start it and wait for its end; seconds by phase, each from the end of the one before."""
        with tempfile.TemporaryDirectory() as place:
            seconds, found = self.run(Path(place))
        marks, last, out = found["marks"], 0.0, {}
        for phase in PHASES[:-1]:
            out[phase] = marks[phase] - last
            last = marks[phase]
        if found["steps"] is None:
            raise RuntimeError("the run ended without a step")
        first, end, count = found["steps"]
        # The first step began when its batch was there.
        training = end - marks["data"] - found["away"]
        return out | {
            "first step": first, "whole": seconds, "steps": float(count), "training": training, "share": training / seconds,
            "seconds": first,
        }  # fmt: skip

    def run(self, place: Path) -> tuple[float, dict[str, Any]]:
        from children import free_port
        from runner import Failed

        environment = dict(os.environ)
        for name in ("TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR") if self.caches else ():
            environment[name] = str(self.caches / name.lower())
            if self.fresh:
                shutil.rmtree(environment[name], ignore_errors=True)
        launcher = Path(sys.executable).with_name("deepspeed")
        ranks = ["--num_gpus", str(self.options.ranks)]
        overrides = [word for text in self.sets for word in ("--set", text)]
        words = [str(launcher), *ranks, "--master_port", str(free_port()), __file__, "--config", self.options.config]
        words += ["--output-dir", str(place / "run"), *overrides]
        start = time.monotonic()
        environment |= {FILE: str(place / "marks.json"), CLOCK: str(start)}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=self.options.timeout)
        seconds = time.monotonic() - start
        if done.returncode != 0:
            lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            raise Failed(f"the command ended with {done.returncode}: {' / '.join(lines[-2:])}")
        return seconds, json.loads((place / "marks.json").read_text())


def main() -> None:
    import torch
    from runner import Candidate, Column, compare, report

    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="ds_configs/digits.json")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() if on_gpu else 2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="length of the runs")
    parser.add_argument("--share", action="store_true", help="one whole run as the run file has it, instead")
    parser.add_argument("--timeout", type=float, default=900)
    parser.add_argument("--json", default="benchmarks/startup.json")
    options = parser.parse_args()
    columns = [Column(name, name, ".2f") for name in (*PHASES, "whole")]
    columns += [Column("training", "in steps", ".2f"), Column("share", "%", ".1f", 100)]
    device = "cuda" if on_gpu else "cpu"
    if options.share:
        candidates, rounds, title = (
            [Candidate("whole run", Command(options, options.set))],
            1,
            "share in training steps",
        )
    else:
        short = [
            f"vitds.train.total_steps={options.steps}", "vitds.train.eval_every_steps=0", "vitds.checkpoint.every_steps=0",
            'scheduler={"type":"constant","params":{}}', "vitds.data.eval=null",
        ]  # fmt: skip
        kept = tempfile.TemporaryDirectory()
        cold = Command(options, [*options.set, *short], Path(kept.name), fresh=True)
        warm = Command(options, [*options.set, *short], Path(kept.name))  # the last cold run has filled the caches
        candidates = [Candidate("cold", cold), Candidate("warm", warm, baseline="cold")]
        rounds, title = options.rounds, "seconds to the first optimizer step"
    what = f"{title}: {options.config} {' '.join(options.set)}, {options.ranks} rank(s)"
    table = compare(
        what, candidates, rounds=rounds, warmup=0, columns=columns, say=lambda line: print(f"  {line}", flush=True)
    )
    report([table], options.json, device)


if __name__ == "__main__":
    if FILE in os.environ:
        watched()
    else:
        main()
