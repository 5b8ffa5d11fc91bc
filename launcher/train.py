"""Train a Vision Transformer on DeepSpeed from one JSON. The whole story is on this page.

    deepspeed launcher/train.py --config ds_configs/digits.json --output-dir runs/digits [--set vitds.train.seed=1]

The same command again goes on from the newest checkpoint.
"""

from __future__ import annotations

import traceback
from contextlib import nullcontext
from typing import Any

import torch

from vitds import dist
from vitds.checkpoint.state import RunState
from vitds.cli import training_arguments
from vitds.config import Plan, RunFile, load_run_file, prepare
from vitds.data import EvalLoader, TrainLoader, to_model_range
from vitds.errors import Stopped, UserError
from vitds.evaluation import evaluate
from vitds.guard import Guard
from vitds.metrics import Recorder, Speedometer, block_norms, closing_lines
from vitds.models import VitdsImageProcessor, flops_per_image
from vitds.optim.groups import describe
from vitds.run_directory import RunDirectory
from vitds.zero.engine import TrainingEngine, init_distributed, precision
from vitds.zero.observe import observed


def main() -> None:
    directory = None
    try:
        options = training_arguments(__doc__)
        run = load_run_file(options.config, options.set, world_size=dist.world_size())
        plan = prepare(run)  # whatever the user got wrong shows here, before any process group
        init_distributed()
        directory = dist.together(lambda: RunDirectory(options.output_dir))
        dist.together(directory.acquire)
        dist.together(lambda: directory.refuse_other_run(run.resolved))
        train(run, directory, plan)
        directory.release()
    except UserError as error:
        if directory is not None:
            directory.record_failure(2)
            directory.release()
        dist.leave_with_user_error(str(error))
    except Exception as error:
        if not (known := isinstance(error, Stopped)):
            traceback.print_exc()
        if directory is not None:
            directory.fail(str(error) if known else "the run failed")
            directory.release()
        dist.leave(1, orderly=known)
    dist.leave(0)


def train(run: RunFile, directory: RunDirectory, plan: Plan) -> None:
    """Engine, state, and all steps from where the run is to its end."""
    part, model, every, (train_source, eval_source) = run.vitds, plan.model, plan.lengths, plan.sources
    config, total, schedule = model.config, every.total, every.schedule
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = part.train.tf32
    engine = TrainingEngine(model, plan.groups, run.optimizer, run.deepspeed, run.accumulation)
    if part.train.compile:
        model.compile_blocks()

    # Where to start: own checkpoint, else init_from, else from scratch.
    processor = VitdsImageProcessor(config.image_size, part.data.eval_edge(config.image_size))
    state = RunState(engine, model, schedule, run.resolved, processor)
    progress, origin = state.restore(directory.checkpoints, part.checkpoint, part.init_from)
    first = progress.step
    dist.together(lambda: directory.write_config(run.resolved))
    recorder = dist.together(lambda: Recorder(directory, run.monitors, total, run.global_batch, first, run.resolved))
    recorder.say(f"{describe(plan.groups)}\n{engine.describe()}\n{origin}: step {first} of {total}")
    directory.event("start", step=first, origin=origin, world_size=dist.world_size())
    directory.outcome("running", None, first)

    shared: dict[str, Any] = {"image_size": config.image_size, "num_classes": config.num_classes}
    shared |= {"rank": dist.rank(), "world_size": dist.world_size()}
    stream = {"seed": part.train.seed, "position": progress.position, "global_batch": run.global_batch}
    loader = TrainLoader(train_source, part.data, micro_batch=run.micro_batch, **stream, **shared)
    held_out = EvalLoader(eval_source, part.data, batch=run.micro_batch, **shared) if eval_source else None
    dtype, evaluation = precision(run.deepspeed), {}
    guard = Guard(part.guard.nonfinite, part.guard.max_skips, scaled=dtype == torch.float16)
    speed = Speedometer(flops_per_image(config), dist.world_size(), dtype, engine.device, part.train)
    recorder.say(speed.describe())

    while progress.step < total:
        done = progress.step + 1
        rate = engine.set_learning_rate(schedule(progress.step))
        due = every.diagnose > 0 and done % every.diagnose == 0
        watching: Any = observed(engine) if due else nullcontext({})
        with watching as norms:
            losses = []
            for micro in range(run.accumulation):
                dist.leave_if_alone()
                with speed.waiting():
                    batch = next(loader)
                if done == first + 1 and micro == 0:
                    recorder.first_batch(batch.images)
                images = to_model_range(batch.images, engine.device)
                loss = engine(images, labels=batch.labels.to(engine.device, non_blocking=True)).loss
                engine.backward(loss)
                losses.append(loss.detach())
                if micro + 1 == run.accumulation:  # the one host sync of a step, before anything is changed
                    mean_loss = dist.mean(torch.stack(losses))
                    guard.check_loss(mean_loss, progress)
                updated = engine.step()
        guard.check_update(updated, engine.gradient_norm, progress)
        progress.advance(run.global_batch, updated)
        if not updated:
            directory.event("skip", step=progress.step, positions=progress.skipped[-1])
            continue

        speed.count(run.global_batch)
        if done == first + 1:
            speed.restart()  # the first step compiles
        if done % every.log == 0 or done == total or due:
            row = {"train/loss": mean_loss, "train/lr": rate, "train/grad_norm": engine.gradient_norm}
            row |= {"train/images_seen": progress.images_seen, **speed.row(), **block_norms(norms)}
            recorder.record(done, row)
            directory.bad_samples(loader.newly_bad())
        with speed.paused():
            if held_out is not None and (done == total or (every.evaluate and done % every.evaluate == 0)):
                evaluation = evaluate(engine, held_out, config.loss)
                recorder.record(done, evaluation)
                directory.bad_samples(held_out.newly_bad())
            if done == total or (every.save and done % every.save == 0):
                directory.check_owner()
                path = state.save(directory.checkpoints, progress, part.checkpoint, evaluation)
                directory.event("save", step=done, path=str(path))

    recorder.say(f"this run is complete: {total} steps\n{closing_lines(directory, run.monitors)}")
    recorder.close()
    loader.close()
    directory.event("finish", step=total, **evaluation)
    directory.outcome("finished", 0, total)


if __name__ == "__main__":
    main()
