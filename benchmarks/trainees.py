"""What trains in `benchmarks/step.py`, each in a process of its own: ours, and its peers of the same shape.

Every trainee takes uint8 images on the device, as our loader leaves them, makes them floating point there, and does one
whole optimizer step: forward, backward, clipping as the run file says, update.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from children import serve
from torch import nn

from vitds import dist
from vitds.config import Plan, RunFile, load_run_file, prepare
from vitds.data import TrainLoader, to_model_range
from vitds.metrics.speed import device_peak, mfu, peak_memory_gib
from vitds.models import ViTForImageClassification, execute_as, flops_per_image
from vitds.models.losses import LOSSES
from vitds.zero import TrainingEngine, init_distributed
from vitds.zero.engine import precision

Step = Callable[[list[tuple[torch.Tensor, torch.Tensor]]], float | torch.Tensor]
"""One optimizer step over the micro batches (images, labels); returns the loss."""


def ours(run: RunFile, plan: Plan, options: Mapping[str, str]) -> Step:
    """The trainer's engine and the steps of its loop."""
    model, schedule = plan.model, plan.lengths.schedule
    engine = TrainingEngine(model, plan.groups, run.optimizer, run.deepspeed, run.accumulation)
    execute_as(run.vitds.train, model, engine.device)
    with torch.no_grad():  # the trainer's own initial values are drawn on the CPU, 20 s of a G/14
        for shard in engine.master_shards():
            shard.data.copy_(torch.randn_like(shard.data).mul_(0.02))
            if re.search(r"norm\d*\.weight$", shard.name):
                shard.data.fill_(1)
    engine.refresh_weights()
    engine.train()

    def step(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        engine.set_learning_rate(schedule(1))
        losses: list[torch.Tensor] = []
        for images, labels in batches:
            if losses:
                engine.step()
            loss = engine(to_model_range(images, engine.device), labels=labels.to(engine.device)).loss
            engine.backward(loss)
            losses.append(loss.detach())
        mean_loss = engine.mean_loss(losses)
        assert engine.step(), "no update: a gradient is not finite"
        return mean_loss

    return step


class Plain(nn.Module):
    """Our model, called as the peers are."""

    def __init__(self, run: RunFile, plan: Plan) -> None:
        super().__init__()
        self.model = ViTForImageClassification(plan.model.config)
        self.model.set_activation_checkpointing(run.vitds.train.activation_checkpointing)
        self.layers = self.model.blocks

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.model(images, labels=labels).loss


class Siglip(nn.Module):
    """transformers' SigLIP vision tower of the run file's shape, with a linear classifier and the run file's loss."""

    def __init__(self, run: RunFile, plan: Plan) -> None:
        from transformers import SiglipVisionConfig, SiglipVisionModel

        super().__init__()
        ours = plan.model.config
        config = SiglipVisionConfig(
            hidden_size=ours.width, intermediate_size=ours.mlp_dim, num_hidden_layers=ours.depth,
            num_attention_heads=ours.num_heads, image_size=ours.image_size, patch_size=ours.patch_size,
        )  # fmt: skip
        config.vision_use_head = ours.pool == "map"
        config._attn_implementation = "sdpa"
        self.tower, self.head = SiglipVisionModel(config), nn.Linear(ours.width, ours.num_classes)
        if run.vitds.train.activation_checkpointing != "none":
            self.tower.gradient_checkpointing_enable({"use_reentrant": False})
        self.layers, self.loss = self.tower.encoder.layers, LOSSES[ours.loss]

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        out = self.tower(images.to(self.head.weight.dtype))
        features = out.pooler_output if self.tower.use_head else out.last_hidden_state.mean(dim=1)
        return self.loss(self.head(features), labels)


class Timm(nn.Module):
    """timm's VisionTransformer of the run file's shape, with the run file's loss."""

    def __init__(self, run: RunFile, plan: Plan) -> None:
        from timm.models.vision_transformer import VisionTransformer

        super().__init__()
        ours = plan.model.config
        self.model = VisionTransformer(
            img_size=ours.image_size, patch_size=ours.patch_size, embed_dim=ours.width, depth=ours.depth,
            num_heads=ours.num_heads, mlp_ratio=ours.mlp_dim / ours.width, num_classes=ours.num_classes,
            class_token=ours.pool == "token", global_pool={"gap": "avg"}.get(ours.pool, ours.pool), act_layer="gelu_tanh",
        )  # fmt: skip
        self.model.set_grad_checkpointing(run.vitds.train.activation_checkpointing != "none")
        self.layers, self.loss = self.model.blocks, LOSSES[ours.loss]

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.loss(self.model(images), labels)


MODELS = {"torch": Plain, "siglip": Siglip, "timm": Timm}


def built(run: RunFile, plan: Plan, options: Mapping[str, str]) -> Any:
    """The peer's model in fp32, made where it computes."""
    with torch.device(dist.device()):
        return MODELS[options["model"]](run, plan).train()


def in_torch(run: RunFile, plan: Plan, options: Mapping[str, str]) -> Step:
    """Plain torch with its fused AdamW: fp32 weights, autocast to the run file's precision unless told fp32; DDP; FSDP2."""
    half = torch.float32 if options.get("precision") == "fp32" else precision(run.deepspeed)
    model, device = built(run, plan, options), dist.device()
    if options.get("compile") == "yes":
        for layer in model.layers:
            layer.compile()
    sharded = options.get("wrap") == "fsdp2"
    if sharded:
        shard(model, half)
    elif options.get("wrap") == "ddp":
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.03, fused=True)
    clip = run.deepspeed["gradient_clipping"]
    cast = torch.autocast(device.type, half, enabled=half != torch.float32 and not sharded)

    def step(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        for number, (images, labels) in enumerate(batches, 1):
            last = number == len(batches)
            if sharded:
                model.set_requires_gradient_sync(last)
            inside = model.no_sync() if options.get("wrap") == "ddp" and not last else contextlib.nullcontext()
            with inside:
                with cast:
                    loss = model(to_model_range(images, device), labels.to(device))
                (loss / len(batches)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def shard(model: Any, half: torch.dtype) -> None:
    """FSDP2 by blocks; sums of gradients in fp32, weights gathered once a step, which is fastest where they fit."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(dist.device().type, (dist.world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def in_deepspeed(run: RunFile, plan: Plan, options: Mapping[str, str]) -> Step:
    """DeepSpeed as users start it: ZeRO-2, its AdamW (FusedAdam on a GPU; torch's on a CPU), its own defaults elsewhere."""
    import deepspeed

    model, device = built(run, plan, options), dist.device()
    fused = options.get("optimizer", "fused") == "fused" and device.type == "cuda"
    config = {
        "train_micro_batch_size_per_gpu": run.micro_batch,
        "gradient_accumulation_steps": run.accumulation,
        "gradient_clipping": run.deepspeed["gradient_clipping"],
        "bf16": {"enabled": precision(run.deepspeed) == torch.bfloat16},
        "zero_optimization": {"stage": int(options.get("stage", 2))},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.03, "torch_adam": not fused}},
    }
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

    def step(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        for images, labels in batches:
            loss = engine(to_model_range(images, device), labels.to(device))
            engine.backward(loss)
            engine.step()
        return loss.detach()

    return step


Trainee = tuple[Callable[[RunFile, Plan, Mapping[str, str]], Step], dict[str, str]]
TRAINEES: dict[str, Trainee] = {
    "ours": (ours, {}),
    "torch": (in_torch, {"model": "torch"}),
    "torch-fp32": (in_torch, {"model": "torch", "precision": "fp32"}),
    "torch-compiled": (in_torch, {"model": "torch", "compile": "yes"}),
    "siglip-deepspeed": (in_deepspeed, {"model": "siglip"}),
    "siglip-deepspeed-torch-adam": (in_deepspeed, {"model": "siglip", "optimizer": "torch"}),
    "siglip-ddp": (in_torch, {"model": "siglip", "wrap": "ddp"}),
    "siglip-ddp-compiled": (in_torch, {"model": "siglip", "wrap": "ddp", "compile": "yes"}),
    "siglip-fsdp2": (in_torch, {"model": "siglip", "wrap": "fsdp2"}),
    "siglip-fsdp2-compiled": (in_torch, {"model": "siglip", "wrap": "fsdp2", "compile": "yes"}),
    "timm": (in_torch, {"model": "timm"}),
    "timm-compiled": (in_torch, {"model": "timm", "compile": "yes"}),
}


def synthetic(path: str, sets: list[str]) -> list[str]:
    """Overrides after which a run file needs no data and no length: images will be made on the device."""
    model = load_run_file(path, sets, world_size=None).vitds.model
    source = {"source": "synthetic", "num_classes": model.num_classes, "num_images": 10**6}
    return [
        *sets, f"vitds.data={json.dumps({'train': source})}", 'scheduler={"type":"constant","params":{}}',
        "vitds.train.total_steps=1000000", "vitds.train.eval_every_steps=0", "vitds.checkpoint.every_steps=1000000",
    ]  # fmt: skip


def batches_of(run: RunFile, plan: Plan, micro: int, images: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Micro batches without end: one on the device over and over, or the run file's own from its loader."""
    model, device = plan.model.config, dist.device()
    if images == "loader":
        loader = TrainLoader(
            plan.sources.train, run.vitds.data, image_size=model.image_size, num_classes=model.num_classes,
            seed=run.vitds.train.seed, global_batch=micro * run.accumulation * dist.world_size(), micro_batch=micro,
            rank=dist.rank(), world_size=dist.world_size(),
        )  # fmt: skip
        yield from ((batch.images, batch.labels) for batch in loader)
    shape = (micro, model.image_size, model.image_size, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    labels = torch.randint(0, model.num_classes, (micro,), device=device)
    while True:
        yield pixels, labels


def begin(kind: str, path: str, sets: list[str], images: str) -> Callable[..., dict[str, Any]]:
    """Build a trainee; the function then answers {"micro", "warmup", "steps"} with what the steps took."""
    # A size that changes between questions is to be compiled for itself, not as a symbol.
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.cache_size_limit = 64
    run = load_run_file(path, sets, world_size=dist.world_size())
    if kind != "ours":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = run.vitds.train.tf32
    plan = prepare(run)
    init_distributed()
    device = dist.device()
    make, options = TRAINEES[kind]
    step = make(run, plan, options)
    half = precision(run.deepspeed) if options.get("precision") != "fp32" else torch.float32
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(half, "tf32" if run.vitds.train.tf32 else "fp32")
    peak = device_peak(device, name, run.vitds.train.peak_tflops)
    source: dict[int, Iterator[tuple[torch.Tensor, torch.Tensor]]] = {}

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def answer(micro: int, warmup: int, steps: int) -> dict[str, Any]:
        if micro not in source:
            source.clear()
            source[micro] = batches_of(run, plan, micro, images)
        forget_peak(device)
        loss: float | torch.Tensor = 0.0
        for number in range(warmup + steps):
            if number == warmup:
                wait()
                dist.barrier()
                start = time.perf_counter()
            loss = step([next(source[micro]) for _ in range(run.accumulation)])
        wait()
        seconds = (time.perf_counter() - start) / steps
        per_second = micro * run.accumulation * dist.world_size() / seconds
        utilisation = mfu(per_second, flops_per_image(plan.model.config), dist.world_size(), peak) if peak else None
        return {
            "seconds": seconds, "images/s": per_second, "mfu": utilisation, "micro": micro,
            "memory": peak_memory_gib(device), "loss": float(loss),
        }  # fmt: skip

    return answer


def forget_peak(device: torch.device) -> None:
    """Let the peak of memory begin at what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=TRAINEES)
    parser.add_argument("config")
    parser.add_argument("sets", help="JSON list of overrides")
    parser.add_argument("--images", choices=("device", "loader"), default="device")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    serve(lambda: begin(arguments.kind, arguments.config, json.loads(arguments.sets), arguments.images))


if __name__ == "__main__":
    main()
