"""`python -m vitds.trial RUN_FILE STEPS [KEY=VALUE …]`: real steps of a run file on noise, alone on this machine's device.

What `vitds shapes --measure` starts for every shape. The trainer's engine makes the steps, whole ones with clipping and
update; images lie on the device and the initial values are noise, so nothing but the step is measured. The last line of
standard output is JSON: images_per_second and peak_bytes, or why it failed.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import torch

from vitds.config import load_run_file, prepare
from vitds.data import to_model_range
from vitds.errors import UserError
from vitds.metrics import peak_memory_gib
from vitds.models import execute_as
from vitds.zero import TrainingEngine, init_distributed


def measure(path: str, steps: int, overrides: list[str]) -> dict[str, float | int | str]:
    """Images a second of `steps` optimizer steps after a first one, and the most memory that was held."""
    run = load_run_file(path, overrides, world_size=1)
    plan = prepare(run)
    init_distributed()
    before = _resident()
    engine = TrainingEngine(plan.model, plan.groups, run.optimizer, run.deepspeed, run.accumulation)
    execute_as(run.vitds.train, plan.model, engine.device)
    noise = torch.Generator(engine.device).manual_seed(0)
    with torch.no_grad():
        for shard in engine.master_shards():
            shard.data.normal_(0, 0.02, generator=noise)
            if re.search(r"norm\d*\.weight$", shard.name):
                shard.data.fill_(1)
    engine.refresh_weights()
    engine.train()
    size, classes = plan.model.config.image_size, plan.model.config.num_classes
    pixels = torch.randint(0, 256, (run.micro_batch, 3, size, size), dtype=torch.uint8, device=engine.device)
    labels = torch.arange(run.micro_batch, device=engine.device) % classes
    started = 0.0
    for step in range(steps + 1):
        losses = list[torch.Tensor]()
        engine.set_learning_rate(plan.lengths.schedule(1))
        for micro in range(run.accumulation):
            loss = engine(to_model_range(pixels, engine.device), labels=labels).loss
            engine.backward(loss)
            losses.append(loss.detach())
            if micro + 1 < run.accumulation:
                engine.step()
        engine.mean_loss(losses)
        engine.step()
        if step == 0 or step == steps:
            if engine.device.type == "cuda":
                torch.cuda.synchronize(engine.device)
            started, last = time.perf_counter(), started
    seconds = started - last
    peak = int(peak_memory_gib(engine.device) * 2**30) - (before if engine.device.type == "cpu" else 0)
    return {"images_per_second": steps * run.global_batch / seconds, "peak_bytes": peak}


def _resident() -> int:
    """Bytes of this process that are in memory now, 0 where the system does not say."""
    try:
        found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def main(words: list[str]) -> int:
    """The exit code."""
    path, steps, *overrides = words
    try:
        found = measure(path, int(steps), overrides)
    except torch.OutOfMemoryError as error:
        found = {"failed": f"out of memory: {str(error).splitlines()[0]}"}
    except UserError as error:
        found = {"failed": str(error).removeprefix(f"{path}: ")}
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch's allocator on CPUs raises nothing narrower
            raise
        found = {"failed": f"out of memory: {error}"}
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
