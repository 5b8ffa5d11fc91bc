"""Train a Vision Transformer on DeepSpeed from one JSON. The whole story is on this page.

    deepspeed launcher/train.py --config ds_configs/digits.json --output-dir runs/digits [--set vitds.train.seed=1]

The same command again goes on from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import traceback
from contextlib import nullcontext

import torch

from vitds import dist
from vitds.checkpoint import prune, remove_leftovers
from vitds.checkpoint.state import Progress, RunState
from vitds.config import RunFile, load_run_file
from vitds.data import EvalLoader, TrainLoader, build_sources, to_model_range
from vitds.errors import UserError
from vitds.evaluation import evaluate
from vitds.guard import Guard
from vitds.metrics import Recorder, Speedometer, block_norms, closing_lines
from vitds.models import ViTForImageClassification, VitdsImageProcessor, build_config, flops_per_image
from vitds.optim.groups import build_groups, describe
from vitds.run_directory import RunDirectory
from vitds.schedules import build_schedule
from vitds.zero.engine import TrainingEngine, init_distributed, precision
from vitds.zero.observe import observed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="run file: DeepSpeed's keys and a section vitds")
    parser.add_argument("--output-dir", required=True, help="directory of this run; holds its checkpoints and metrics")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, as in vitds.train.seed=1")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    options = parser.parse_args()
    directory = None
    try:
        run = load_run_file(options.config, options.set, world_size=dist.world_size())
        sources = build_sources(run.vitds.data, run.vitds.model.num_classes)
        init_distributed()
        directory = dist.together(lambda: RunDirectory(options.output_dir))
        dist.together(directory.acquire)
        dist.together(lambda: directory.write_config(run.resolved))
        train(run, sources, directory)
    except UserError as error:
        dist.leave_with_user_error(str(error))
    except Exception:
        traceback.print_exc()
        if directory is not None:
            directory.fail()
        dist.leave(1, orderly=False)
    dist.leave(0)


def train(run: RunFile, sources: tuple, directory: RunDirectory) -> None:
    """From configuration to the last step, once."""
    part, (train_source, eval_source) = run.vitds, sources
    world, rank, batch = dist.world_size(), dist.rank(), run.global_batch

    # How long, and how often what.
    length = {"global_batch": batch, "images_per_epoch": len(train_source)}
    total = part.train.total.to_steps(**length)
    log, save, assess, diagnose = (
        every.to_steps(**length, total_steps=total)
        for every in (part.train.log_every, part.checkpoint.every, part.train.eval_every, part.train.diagnostics_every)
    )
    schedule = build_schedule(run.scheduler, total_steps=total, **length)

    # Model, groups, engine. The weights come last, straight into the fp32 masters.
    config = build_config(part.model)
    with torch.device("meta"):
        model = ViTForImageClassification(config)
    model.set_activation_checkpointing(part.train.activation_checkpointing)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = part.train.tf32
    groups = build_groups(model.shapes, **run.rates, decay_patterns=model.decay_patterns(), overrides=part.groups)
    engine = TrainingEngine(model, groups, run.optimizer, run.deepspeed, run.accumulation)
    if part.train.compile:
        model.compile_blocks()

    # Where to go on: own checkpoint, else init_from, else from scratch.
    state = RunState(engine, model, schedule, run.resolved, VitdsImageProcessor(config.image_size, part.data.eval_edge(config.image_size)))
    remove_leftovers(directory.checkpoints)
    progress, origin = state.restore(directory.checkpoints, part.checkpoint.verify, part.init_from)
    recorder = dist.together(lambda: Recorder(directory, run.monitors, total, batch, progress.step, run.resolved))
    recorder.say(f"{describe(groups)}\n{engine.describe()}\n{origin}: step {progress.step} of {total}, {batch} images a step")
    if progress.step >= total:
        recorder.say(f"this run is complete\n{closing_lines(directory, run.monitors)}")
        directory.outcome("finished", 0, progress.step)
        return
    directory.event("start", step=progress.step, origin=origin, world_size=world)
    directory.outcome("running", None, progress.step)

    shared = {"image_size": config.image_size, "num_classes": config.num_classes, "rank": rank, "world_size": world}
    loader = TrainLoader(
        train_source, part.data, seed=part.train.seed, global_batch=batch, micro_batch=run.micro_batch, position=progress.position, **shared
    )
    held_out = EvalLoader(eval_source, part.data, batch=run.micro_batch, **shared) if eval_source is not None else None
    guard = Guard(part.guard.nonfinite, part.guard.max_skips, precision(run.deepspeed) == torch.float16)
    speed = Speedometer(flops_per_image(config), world, precision(run.deepspeed), engine.device, part.train)
    evaluation: dict[str, float] = {}
    first = progress.step

    while progress.step < total:
        dist.leave_if_alone()
        step = progress.step
        lr, losses, done = engine.set_learning_rate(schedule(step)), [], step + 1
        with observed(engine) if diagnose and done % diagnose == 0 else nullcontext({}) as norms:
            for micro in range(run.accumulation):
                with speed.waiting():
                    images = next(loader)
                if step == first and micro == 0:
                    recorder.first_batch(images.images)
                loss = engine(to_model_range(images.images, engine.device), labels=images.labels.to(engine.device)).loss
                engine.backward(loss)
                losses.append(loss.detach())
                if micro + 1 == run.accumulation:  # the one host sync of a step, before anything is changed
                    mean_loss = dist.mean(torch.stack(losses))
                    guard.check_loss(mean_loss, step, progress.position)
                updated = engine.step()
        guard.check_update(updated, engine.gradient_norm, step, progress.position)
        progress.position += batch
        if not updated:
            progress.skipped.append([progress.position - batch, progress.position])
            directory.event("skip", step=step, position=progress.position - batch, grad_norm=engine.gradient_norm)
            continue
        progress.step, progress.images_seen = done, progress.images_seen + batch
        speed.count(batch)

        if done % log == 0 or done == total or norms:
            row = {"train/loss": mean_loss, "train/lr": lr, "train/grad_norm": engine.gradient_norm, "train/images_seen": progress.images_seen}
            recorder.record(done, {**row, **speed.row(), **block_norms(norms)})
        with speed.paused():
            if held_out is not None and (done == total or (assess and done % assess == 0)):
                evaluation = evaluate(engine, held_out, config.loss)
                recorder.record(done, evaluation)
            if done == total or (save and done % save == 0):
                path = state.save(directory.checkpoints, progress, evaluation)
                prune(directory.checkpoints, part.checkpoint.keep_last, part.checkpoint.keep_every_steps, path)
                directory.event("save", step=done, path=str(path))

    recorder.say(f"finished after {total} steps\n{closing_lines(directory, run.monitors)}")
    recorder.close()
    directory.event("finish", step=total, **evaluation)
    directory.outcome("finished", 0, total)
    directory.release()
    loader.close()


if __name__ == "__main__":
    main()
