"""How the model's arithmetic is carried out, which the run file says and no stopwatch decides: a resumed run must go on
with the bits of the unbroken one. What is fastest on a device, `benchmarks/step.py` measures.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from vitds.errors import UserError
from vitds.models.vit import ViTForImageClassification

KERNELS = ("flash", "cudnn", "efficient", "math")
ATTENTION = ("default", *KERNELS)
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs")


class ExecutionSettings(Protocol):
    """The keys of the run file that execution is chosen by."""

    @property
    def attention(self) -> str: ...

    @property
    def compile(self) -> bool: ...

    @property
    def compile_mode(self) -> str: ...

    @property
    def tf32(self) -> bool: ...


def check_compile_mode(compiled: bool, mode: str, stage: int) -> None:
    """Refuse what a mode cannot do.

    A CUDA graph reads and writes the addresses it was recorded with. Under ZeRO-3 a weight is gathered somewhere else
    each time. At stages 0 and 1 DeepSpeed may keep a micro batch's gradients where the graph has put them, and the next
    micro batch would overwrite them; stage 2 has copied them into its bucket by then.

    Raises:
        UserError: a mode without `compile`, or CUDA graphs at another ZeRO stage than 2.
    """
    if mode != "default" and not compiled:
        raise UserError(f"vitds.train.compile_mode: {mode!r} changes nothing without vitds.train.compile=true")
    if mode == "reduce-overhead" and stage != 2:
        why = "weights move under ZeRO-3" if stage == 3 else "gradients may stay in the graphs' own memory there"
        raise UserError(
            f"vitds.train.compile_mode: 'reduce-overhead' records CUDA graphs, which need zero_optimization.stage 2 (legal "
            f"on one GPU), found {stage}: {why}; allowed here: default, max-autotune-no-cudagraphs"
        )


def execute_as(settings: ExecutionSettings, model: ViTForImageClassification, device: torch.device) -> None:
    """Make this process, and the blocks of a model whose weights have their precision, compute as the run file says.

    Raises:
        UserError: a kind of attention or CUDA graphs that this device does not have.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.tf32
    choose_attention(settings.attention, model.config.shape.head_dim, model.pos_embed.dtype, device)
    if settings.compile and settings.compile_mode == "reduce-overhead" and device.type != "cuda":
        raise UserError(
            f"vitds.train.compile_mode: 'reduce-overhead' records CUDA graphs; this run is on {device.type}"
        )
    if settings.compile:
        model.compile_blocks(**({} if settings.compile_mode == "default" else {"mode": settings.compile_mode}))
    if settings.compile and settings.compile_mode == "reduce-overhead":
        # Where no backward pass is to come, torch takes each block for a new iteration, which may overwrite what the block
        # before it has returned, and raises (pytorch issues 152887 and 160281). One forward pass is one iteration.
        model.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())


def choose_attention(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Let torch's attention use this kernel alone, here and in all that is compiled later; "default" leaves torch its order.

    Raises:
        UserError: the kernel cannot do one small forward and backward pass here; the message says which ones can.
    """
    if kernel == "default":
        return _allow(*KERNELS)
    failures = {name: _failure(name, head_dim, dtype, device) for name in KERNELS}
    if failures[kernel] is not None:
        able = [name for name, failure in failures.items() if failure is None]
        precision = str(dtype).removeprefix("torch.")
        raise UserError(
            f"vitds.train.attention: {kernel!r} cannot run here, on {device.type} in {precision} with heads {head_dim} wide: "
            f"{failures[kernel]}; these can: {', '.join(['default', *able])}"
        )
    _allow(kernel)


def _allow(*kernels: str) -> None:
    """Set torch's switches, which are of the process and which torch.compile reads as it traces."""
    switches = {
        "flash": torch.backends.cuda.enable_flash_sdp, "cudnn": torch.backends.cuda.enable_cudnn_sdp,
        "efficient": torch.backends.cuda.enable_mem_efficient_sdp, "math": torch.backends.cuda.enable_math_sdp,
    }  # fmt: skip
    for name, switch in switches.items():
        switch(name in kernels)


def _failure(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """What a forward and a backward pass through this kernel raise, in a line; None where they work."""
    _allow(kernel)
    try:
        # fp32 on CPUs, as in vitds.models.layers.attend
        tiny = torch.ones(1, 1, 16, head_dim, dtype=torch.float32 if device.type == "cpu" else dtype, device=device)
        F.scaled_dot_product_attention(tiny.requires_grad_(), tiny, tiny).sum().backward()
        return None
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        _allow(*KERNELS)
