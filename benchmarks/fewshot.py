"""What the few-shot probe inside training costs: its equations on this device, and its share of a run's wall time.

    python benchmarks/fewshot.py [--width 1664] [--classes 100] [--per-class 30] [--test 5000] [--device cpu] [--rounds 3] [--json PATH]
    python benchmarks/fewshot.py --run runs/digits

The first form solves the probes of all shots of one seed on features as G/14 has them, beside numpy in float64 with the
reference's eigendecompositions, and says how far apart the weights are and how many predictions differ. Then the
arithmetic of the paper's recipe: the images of its sets against those that are trained on between two probes. The second
form reads what a run has measured of itself (perf/fewshot_seconds, perf/images_per_second in its metrics.jsonl).
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from runner import MILLISECONDS, Candidate, Column, compare, report

from vitds.evaluation.probe_sets import draw
from vitds.evaluation.ridge import Probe, Rows, solve
from vitds.metrics import read_metrics
from vitds.models import ModelSection, build_config, flops_per_image

SHOTS, SEEDS, L2 = (1, 5, 10, 25), 3, 1024.0
SETS = {
    "caltech101": (102, 3060, 6084), "cars196": (196, 8144, 8041), "cifar100": (100, 50000, 10000), "dtd": (47, 1880, 1880),
    "oxford_iiit_pet": (37, 3680, 3669), "uc_merced": (21, 1000, 1100), "imagenet": (1000, 65000, 50000),
}  # fmt: skip
"""The recipe's, with their classes and images of train and test as their makers give them."""
EVERY_STEPS, GLOBAL_BATCH = 10_000, 4096


def made(width: int, classes: int, per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) that a probe can tell apart a little, and labels (N,)."""
    centres = np.random.default_rng(0).normal(size=(classes, width)).astype(np.float32)
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(classes), per_class))
    noise = rng.standard_normal((len(labels), width), dtype=np.float32)
    return 0.1 * centres[labels] + noise, labels


def by_numpy(features: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, scale and weights (D + 1, C), as the reference works them out, in float64."""
    features = features.astype(np.float64)
    mean, std = features.mean(axis=0), features.std(axis=0) + 1e-5
    x = np.pad((features - mean) / std, ((0, 0), (0, 1)), constant_values=100.0)
    y = 2.0 * np.eye(classes)[labels] - 1
    if len(x) >= x.shape[1]:
        e, q = np.linalg.eigh(x.T @ x)
        return mean, std, (q / (e + L2)) @ (q.T @ (x.T @ y))
    e, q = np.linalg.eigh(x @ x.T)
    return mean, std, ((x.T @ q) / (e + L2)) @ (q.T @ y)


class Solvers:
    """Both solvers on the same images; what each found last."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.classes, self.device = options.classes, options.device
        self.features, self.labels = made(options.width, options.classes, options.per_class, seed=1)
        self.unseen, self.theirs = made(options.width, options.classes, -(-options.test // options.classes), seed=2)
        self.places = draw(self.labels, 0, max(SHOTS), options.classes)
        kept = self.places >= 0
        self.rows = Rows(*(torch.from_numpy(each[kept]) for each in (self.features, self.labels, self.places)))
        self.probes: dict[int, Probe] = {}
        self.solutions: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def ours(self) -> None:
        self.probes = dict(solve(self.rows, SHOTS, self.classes, L2, self.device))

    def reference(self) -> None:
        for k in SHOTS:
            chosen = (self.places >= 0) & (self.places < k)
            self.solutions[k] = by_numpy(self.features[chosen], self.labels[chosen], self.classes)

    def predictions(self) -> None:
        for probe in self.probes.values():
            probe.count_right(torch.from_numpy(self.unseen), torch.from_numpy(self.theirs))

    def differences(self) -> list[str]:
        lines = []
        for k, (mean, std, weights) in self.solutions.items():
            probe = self.probes[k]
            x = np.pad((self.unseen - mean) / std, ((0, 0), (0, 1)), constant_values=100.0)
            ours = probe.scores(torch.from_numpy(self.unseen)).argmax(dim=1).cpu().numpy()
            apart = np.abs(probe.weights.cpu().numpy() - weights).max() / np.abs(weights).max()
            theirs = (x @ weights).argmax(axis=1)
            form = "primal" if k * self.classes >= len(mean) + 1 else "dual"
            lines.append(
                f"{k:>3} shots, {form:<6}: weights {apart:.1e} apart, relative to the largest; {(ours != theirs).sum()} of {len(ours)} "
                f"predictions differ; accuracy {(theirs == self.theirs).mean():.4f}"
            )
        return lines


def arithmetic(variant: str) -> list[str]:
    """The recipe's share, in images through the model: a forward pass is a third of what training an image takes."""
    trained = 3 * EVERY_STEPS * GLOBAL_BATCH
    lines = [
        f"{variant}, {EVERY_STEPS:,} steps of {GLOBAL_BATCH:,} images between two probes: {trained / 1e6:.1f} M forward passes' worth"
    ]
    flops = flops_per_image(build_config(ModelSection(variant=variant)))
    width = build_config(ModelSection(variant=variant)).width
    totals = {"without ImageNet": [n for n in SETS if n != "imagenet"], "with ImageNet": [*SETS]}
    for words, names in totals.items():
        passes, solving = 0, 0.0
        for name in names:
            classes, train, test = SETS[name]
            passes += min(train, SEEDS * max(SHOTS) * classes) + test
            solving += SEEDS * solving_flops(width, classes, train, test)
        share = passes / trained
        lines.append(
            f"  {words}: at most {passes:,} passes, {share:.3%} of the arithmetic; the solutions {solving / 1e12:.1f} TFLOP in "
            f"float64 ({solving / (passes * flops):.3%} of the passes')"
        )
    return lines


def solving_flops(width: int, classes: int, train: int, test: int) -> float:
    """Of one seed's probes: Gram matrices, Cholesky and its solutions, predictions."""
    total, done = 0.0, 0
    for k in SHOTS:
        rows = min(train, k * classes)
        side = width if rows > width else rows
        total += 2 * (rows - done) * width**2 if rows > width else 2 * rows**2 * width
        done = rows if rows > width else 0
        total += side**3 / 3 + 2 * side**2 * classes + 2 * test * width * classes
    return total


def of_run(run: Path) -> list[str]:
    """What a run's metrics say of the probe's share."""
    resolved = json.loads((run / "config.json").read_text())
    rows, batch = read_metrics(run), resolved["train_batch_size"]
    probes = [(row["step"], row["perf/fewshot_seconds"]) for row in rows if "perf/fewshot_seconds" in row]
    speeds = [row["perf/images_per_second"] for row in rows if "perf/images_per_second" in row]
    if not probes or not speeds:
        raise SystemExit(f"{run}: no probe or no speed in metrics.jsonl")
    step = batch / float(np.median(speeds))
    gaps = [later - earlier for earlier, later in itertools.pairwise([0, *(at for at, _ in probes)])]
    seconds = float(np.median([cost for _, cost in probes]))
    every = float(np.median(gaps))
    return [
        f"{run}: {len(probes)} probes of {seconds:.3f} s (median), {every:g} steps apart; a step takes {step * 1e3:.1f} ms",
        f"  {seconds / (seconds + every * step):.2%} of wall time as it ran; {seconds / (seconds + EVERY_STEPS * step):.3%} every {EVERY_STEPS:,} steps",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--width", type=int, default=1664)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--per-class", type=int, default=30)
    parser.add_argument("--test", type=int, default=5000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.run is not None:
        print("\n".join(of_run(options.run)))
        return
    solvers = Solvers(options)
    facts: dict[str, Any] = {"shots": ",".join(map(str, SHOTS))}
    candidates = [
        Candidate("numpy, eigh, float64", solvers.reference, facts=facts),
        Candidate("ours", solvers.ours, "numpy, eigh, float64", facts=facts),
        Candidate("ours: predictions", solvers.predictions, facts=facts),
    ]
    title = (
        f"probes of one seed: {options.width} features, {options.classes} classes, {len(solvers.theirs)} test images"
    )
    columns = [MILLISECONDS, Column("shots", "shots", "")]
    table = compare(title, candidates, rounds=options.rounds, warmup=0, device=options.device, columns=columns)
    report([table], options.json, options.device)
    print("\n".join([*solvers.differences(), "", *arithmetic("ViT-G/14")]))


if __name__ == "__main__":
    main()
