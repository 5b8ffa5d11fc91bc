"""How much memory a rank needs, by kind and by moment, before anything runs.

A step has moments at which memory may be largest; each part says at which of them it is there:

    loss            all activations, the loss and its gradient
    last block      all activations, and the backward pass of the block that ran last
    first block     one block's activations, every gradient
    step            gradients, the optimizer's transients
    evaluation      a forward pass that keeps nothing
"""

from __future__ import annotations

from dataclasses import dataclass

from vitds.planning import activations
from vitds.planning.states import ALWAYS, PASSES, states
from vitds.planning.workload import Workload

MOMENTS = ALWAYS
CONTEXT = 600 * 2**20
"""CUDA context, cuBLAS and cuDNN handles, kernels: outside torch's count. Assumed; `vitds plan --device` on a GPU measures none of it."""
CUBLAS = 32 * 2**20
"""cuBLAS's workspace, which torch allocates on Hopper (torch's documentation of CUBLAS_WORKSPACE_CONFIG: :4096:2:16:8 is 8 MiB, 32 MiB on
Hopper)."""
NCCL = 400 * 2**20
"""NCCL's channels and buffers for a few process groups on more than one rank. Assumed."""
MARGIN = 0.03
"""Fragmentation: what torch has reserved and cannot use, as a part of its tensors. Assumed."""


@dataclass(frozen=True)
class Part:
    """One kind of memory."""

    kind: str
    what: str
    bytes: int
    when: tuple[str, ...] = MOMENTS


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
        """What it cannot do without."""
        return self.peak


def memory(workload: Workload, ranks: int) -> Memory:
    """What a rank needs to train and evaluate.

    Args:
        ranks: that share the states; each holds as much as the fullest of them.
    """
    parts = [Part(*entry) for entry in states(workload, ranks)]
    parts += [Part("activations", kind, size, PASSES[:2]) for kind, size in activations.blocks(workload).items()]
    parts += [Part("activations", kept.kind, kept.bytes, PASSES[:2]) for kept in activations.ends(workload)]
    again, passing = activations.again(workload), activations.passing(workload)
    parts.append(Part("activations", "computed again", again, PASSES[1:]))
    parts.append(Part("activations", "gradients on their way", passing, PASSES[1:]))
    parts.append(Part("activations", "of a forward pass", passing, ("evaluation",)))
    peak = Memory(tuple(parts), ()).peak
    outside = [Part("margin", f"{MARGIN:.0%}", int(MARGIN * peak))]
    if workload.device == "cuda":
        outside += [Part("workspace", "CUDA context", CONTEXT), Part("workspace", "cuBLAS", CUBLAS)]
        outside += [Part("workspace", "NCCL", NCCL)] if ranks > 1 else []
    return Memory(tuple(part for part in parts if part.bytes), tuple(outside))
