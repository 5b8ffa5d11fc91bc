"""How much memory a rank needs, by kind and by moment, before anything runs.

Each part is there at some of the moments of a step at which memory may be most:

    loss            all activations, and the loss's own passes
    backward        in the block where it is most: activations of this block and those before it, gradients of those after it
    reduction       all gradients, on their way between ranks
    step            gradients, and what the optimizer needs beside them
    evaluation      a forward pass that keeps nothing
    saving          a bucket of a checkpoint
"""

from __future__ import annotations

from dataclasses import dataclass

from vitds.planning.activations import activations, evaluation
from vitds.planning.states import BACKWARD, EVALUATION, LOSS, MOMENTS, Part, States
from vitds.planning.workload import Workload

CONTEXT = 600 * 2**20
"""CUDA context, cuBLAS and cuDNN handles, kernels: outside torch's count. Assumed; `vitds plan --device` on a GPU measures none of it."""
CUBLAS = 32 * 2**20
"""cuBLAS's workspace, which torch allocates on Hopper (torch's documentation of CUBLAS_WORKSPACE_CONFIG: :4096:2:16:8 is 8 MiB, 32 MiB on
Hopper)."""
NCCL = 400 * 2**20
"""NCCL's channels and buffers for a few process groups on more than one rank. Assumed."""
ERROR = 0.08
"""By so much the forecast was above what was measured at most (tests/planning/test_memory.py, on CPUs)."""
MARGIN = 0.03
"""Fragmentation: what torch has reserved and cannot use, as a part of its tensors. Assumed."""


@dataclass(frozen=True)
class Memory:
    """What one rank needs."""

    parts: tuple[Part, ...]
    """Tensors."""
    outside: tuple[Part, ...]
    """What is not torch's: context, workspace, margin."""

    @property
    def moments(self) -> dict[str, int]:
        """Bytes of tensors at each moment."""
        return {moment: sum(p.bytes for p in self.parts if moment in p.when) for moment in MOMENTS}

    @property
    def worst(self) -> str:
        """The moment at which it is most."""
        moments = self.moments
        return max(moments, key=lambda moment: moments[moment])

    @property
    def peak(self) -> int:
        """Bytes of tensors at that moment: what torch.cuda.max_memory_allocated would say."""
        return self.moments[self.worst]

    @property
    def total(self) -> int:
        """What the device must have: tensors, what lies outside them, and the margin."""
        return self.peak + sum(part.bytes for part in self.outside)

    @property
    def least(self) -> int:
        """What it cannot do without, so far as the forecast is to be trusted."""
        return int(self.peak * (1 - ERROR))


def memory(workload: Workload, ranks: int, states: States | None = None) -> Memory:
    """What a rank needs to train and evaluate.

    Args:
        ranks: that share the states; each holds as much as the fullest of them.
        states: of a workload that differs in the micro batch alone, to save time.
    """
    states, acts, name = states or States(workload, ranks), activations(workload), "activations"
    depth, ends = len(acts.blocks), acts.ends
    parts = states.steady()
    parts += [Part(name, kind, size, (LOSS,)) for kind, size in acts.kept(depth).items()]
    parts += [Part(name, kind, size, (LOSS,)) for kind, size in ends.items() if kind not in ("images", "patches")]
    parts.append(Part(name, "the loss's and pooling's passes", acts.loss, (LOSS,)))
    parts.append(Part(name, "patches", ends["patches"], (LOSS, BACKWARD)))
    parts.append(Part(name, "images", ends["images"], tuple(m for m in MOMENTS if m != EVALUATION)))
    parts.append(Part(name, "of a forward pass", evaluation(workload), (EVALUATION,)))
    backwards = []
    for block in range(depth):
        for in_attention, brought in enumerate(acts.backward[block]):
            found = states.during(block, bool(in_attention))
            found += [Part(name, kind, size, (BACKWARD,)) for kind, size in acts.kept(block + 1).items()]
            found.append(Part(name, f"block {block}'s backward pass", brought, (BACKWARD,)))
            backwards.append(found)
    parts += max(backwards, key=lambda found: sum(part.bytes for part in found))
    peak = Memory(tuple(parts), ()).peak
    outside = [Part("margin", f"{MARGIN:.0%}", int(MARGIN * peak))]
    if workload.device == "cuda":
        outside += [Part("workspace", "CUDA context", CONTEXT), Part("workspace", "cuBLAS", CUBLAS)]
        outside += [Part("workspace", "NCCL", NCCL)] if ranks > 1 else []
    return Memory(tuple(part for part in parts if part.bytes), tuple(outside))
