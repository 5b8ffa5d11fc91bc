"""The run file's `vitds.train`."""

from __future__ import annotations

from dataclasses import dataclass

from vitds.models import ATTENTION, COMPILE_MODES
from vitds.sections import Duration, check_least, key


@dataclass(frozen=True)
class TrainSection:
    """How long, with which seed, and how often what is done beside the steps."""

    total: Duration = key(Duration(10_000), "Length of the run.")
    seed: int = key(0, "Seed of the initial weights, the order of images and their augmentation.")
    activation_checkpointing: str = key(
        "none", "Recompute activations in the backward pass: none, full, every:N blocks or selective."
    )
    compile: bool = key(False, "Compile the transformer blocks with torch.compile.")
    compile_mode: str = key(
        "default",
        "torch.compile's mode: reduce-overhead records CUDA graphs around the blocks (ZeRO-2 alone); max-autotune… measures "
        "kernels as it compiles, so that a resume may choose others.",
        choices=COMPILE_MODES,
    )
    attention: str = key(
        "default",
        "Kernel of attention, or an error where it cannot run; default is torch's own order.",
        choices=ATTENTION,
    )
    tf32: bool = key(True, "Let fp32 matrix products use TF32 on GPUs that have it.")
    log_every: Duration = key(Duration(50), "Interval of metrics rows and progress lines.")
    eval_every: Duration = key(Duration(0), "Interval of evaluations; 0 evaluates at the end only.")
    diagnostics_every: Duration = key(
        Duration(0), "Interval of per-block gradient, weight and update norms; 0 is never."
    )
    peak_tflops: float | None = key(
        None, "Dense peak of one device in the training precision, for MFU; known for common GPUs."
    )

    def __post_init__(self) -> None:
        check_least("vitds.train", self, seed=0, peak_tflops=0)
