"""Train a Vision Transformer on DeepSpeed from one JSON; the same command again goes on from the newest checkpoint.

deepspeed launcher/train.py --config ds_configs/digits.json --output-dir runs/digits [--set vitds.train.seed=1]"""

from functools import partial
from typing import Any

import torch

from vitds import dist
from vitds.arguments import training_arguments
from vitds.checkpoint.state import Progress, RunState
from vitds.cluster.preflight import preflight
from vitds.cluster.watch import Stragglers, Watch
from vitds.config import Plan, RunFile, load_run_file, prepare
from vitds.data import BadSamples, Batch, TooManyBad, TrainLoader, to_model_range
from vitds.errors import Preempted, Stopped
from vitds.evaluation import Evaluations
from vitds.guard import Guard
from vitds.interruption import Interruption, outlive_the_console
from vitds.launched import adopt
from vitds.metrics import Recorder, Speedometer, StepProfile, Window, block_norms, closing_lines
from vitds.models import execute_as, flops_per_image
from vitds.optim.groups import describe
from vitds.run_directory import RunDirectory
from vitds.zero import TrainingEngine, explain, init_distributed, observed, refusals_shared


def main() -> None:
    outlive_the_console()
    with Interruption() as interruption:
        try:
            adopt()
            options = training_arguments(__doc__)
            with refusals_shared():  # whatever the user got wrong shows here, before any process group
                run = load_run_file(options.config, options.set, world_size=dist.world_size())
                plan = prepare(run, forecast=not options.ignore_forecast, output=options.output_dir)
            with Watch(run.vitds.cluster, options.output_dir) as watch:
                init_distributed()
                with dist.together(lambda: RunDirectory(options.output_dir)) as directory:
                    dist.together(lambda: directory.refuse_other_run(run.resolved, plan.images))
                    preflight(directory.path, run.resolved, plan.images)
                    with watch.introduce(directory.incident):
                        train(run, directory, plan, interruption, watch, options.profile)
        except BaseException as error:
            dist.leave_after(error)
        dist.leave(0)


def train(run: RunFile, directory: RunDirectory, plan: Plan, stop: Interruption, watch: Watch, asked: Window) -> None:
    """Engine, state, and all steps from where the run is to its end."""
    part, model, every, sources = run.vitds, plan.model, plan.lengths, plan.sources
    config, total, schedule = model.config, every.total, every.schedule
    engine = TrainingEngine(model, plan.groups, run.optimizer, run.deepspeed, run.accumulation)
    execute_as(part.train, model, engine.device)
    state = RunState(
        engine, model, schedule, run.resolved, plan.processor, directory, part.checkpoint, part.ema, plan.images
    )
    state.during = watch.during
    bad = BadSamples(part.data.max_bad_samples, directory)
    shared: dict[str, Any] = {"image_size": config.image_size, "num_classes": config.num_classes}
    shared |= {"rank": dist.rank(), "world_size": dist.world_size(), "bad": bad}
    stream = {"seed": part.train.seed, "global_batch": run.global_batch, "micro_batch": run.micro_batch, **shared}

    def go_on() -> tuple[Progress, TrainLoader, Guard, str]:
        progress, origin = state.restore(part.init_from)  # own checkpoint, else init_from, else from scratch
        guard = Guard(part.guard, engine.dtype == torch.float16, progress.losses, rollbacks=len(directory.skips))
        loader = TrainLoader(sources.train, part.data, position=progress.position, skipped=progress.skipped, **stream)
        return progress, loader, guard, origin

    progress, loader, guard, origin = go_on()
    edge = partial(state.edge, stop, bad, lambda: watch.beat(progress.step))  # where nothing is half done
    dist.together(lambda: directory.write_config(run.resolved, plan.images))
    logged = (directory, run.monitors, total, run.global_batch, progress.step, run.resolved)
    recorder = dist.together(lambda: Recorder(*logged))
    measured = (engine, sources, plan.probes, part.data, part.fewshot, every, state.evaluated, watch.during)
    evaluations = Evaluations(*measured, loss=config.loss, batch=run.micro_batch, **shared)
    speed = Speedometer(flops_per_image(config), dist.world_size(), engine.dtype, engine.device, part.train)
    slow = Stragglers(part.cluster, engine.device, engine.stage)
    profile = StepProfile(asked, directory, engine.device, recorder.say, progress.step, total)
    said = (describe(plan.groups), engine.describe(), state.describe(), speed.describe(), evaluations.remarks)
    recorder.say("\n".join([*filter(None, said), f"{origin}: step {progress.step} of {total}"]))
    directory.started(progress.step, origin)

    try:
        while True:
            with speed.paused():
                if figures := evaluations.measure(progress, edge):
                    recorder.record(progress.step, figures)
                if every.due(every.save, progress.step):
                    state.save(progress, safe=guard.reach(progress, run.global_batch))
            if progress.step == total:
                break
            rate = engine.set_learning_rate(schedule(progress.step))
            with profile.step(progress.step), observed(engine, every.diagnosed(progress.step + 1)) as norms:
                batches, losses = list[Batch](), list[torch.Tensor]()
                while len(batches) < run.accumulation:
                    if batches:
                        engine.step()  # nothing is updated inside an accumulation
                    with speed.waiting(), slow.data:
                        batches.append(next(loader))
                    edge()
                    recorder.first_batch(batches[0].images)
                    images = to_model_range(batches[-1].images, engine.device)
                    with slow.forward:
                        loss = engine(images, labels=batches[-1].labels.to(engine.device, non_blocking=True)).loss
                    with slow.backward:
                        engine.backward(loss)
                    losses.append(loss.detach())
                mean_loss = engine.mean_loss(losses)  # waits for the device, before anything is changed
                verdict = guard.judge(mean_loss)
                with profile.optimizer():
                    updated = engine.step(drop=verdict != "update")
            if verdict == "spike":
                guard.check_spike(mean_loss, progress)
                given_up = progress.last_batches(part.guard.spike_batches, run.global_batch)
                directory.add_skip(*given_up, step=progress.step, loss=mean_loss)
                loader.close()
                progress, loader, guard, origin = go_on()
                recorder.say(f"the loss leapt to {mean_loss:.4g}; positions {given_up} are left out; {origin}")
                continue
            blame = partial(explain, engine, batches, loader.keys, directory.event, progress.step)
            guard.check_update(updated, mean_loss, engine.gradient_norm, progress, blame)
            positions = progress.advance(run.global_batch, updated)
            if not updated:
                directory.event("skip", step=progress.step, positions=positions)
                continue
            state.average()
            speed.count(run.global_batch)
            compared = slow.compare(progress.step, directory.event)
            if every.due(every.log, progress.step) or norms or compared:
                row = {"train/loss": mean_loss, "train/lr": rate, "train/grad_norm": engine.gradient_norm}
                row |= {"train/images_seen": progress.images_seen, **bad.row("train"), **speed.row()}
                recorder.record(progress.step, row | block_norms(norms) | compared)
        state.finish(progress)
        directory.finished(total, progress.evaluation)
        recorder.say(f"this run is complete: {total} steps\n{closing_lines(directory, run.monitors)}")
    except Preempted as reason:
        raise state.preempted(progress, reason) from reason
    except (Stopped, TooManyBad) as error:
        state.stopped(progress, error)
        raise
    finally:
        recorder.close()
        loader.close()


if __name__ == "__main__":
    main()
