"""What checkpoints take: bytes on disk and in the host's memory, and how long a save keeps training waiting."""

from __future__ import annotations

from dataclasses import dataclass

from vitds.planning.optimizer_state import state_bytes
from vitds.planning.workload import Workload

COPY = 20e9
"""Bytes a second from a GPU into its host's memory (PCIe 4 × 16 has 32e9 on paper). Assumed: unmeasured here."""


@dataclass(frozen=True)
class Storage:
    """Of one checkpoint."""

    bytes: int
    share: int
    """Of a rank, and what its host keeps for it."""
    stall: float
    """Seconds that training waits: the copy into the host's memory."""
    background: float
    """Seconds of writing while training goes on."""

    def describe(self) -> str:
        """For people."""
        return (
            f"a checkpoint is {self.bytes / 1e9:,.1f} GB; a save stalls training {self.stall:.1f} s and writes {self.background:,.0f} s beside "
            f"it; each rank's host needs {self.share / 2**30:,.1f} GiB for the copy (page-locked), besides the loader's batches"
        )


def storage(workload: Workload, ranks: int, disk: float) -> Storage:
    """Masters in fp32 of every parameter, the optimizer's state, and the average where there is one (vitds.checkpoint).

    Args:
        disk: bytes a second that a rank writes; ranks write side by side.
    """
    everything = 4 * sum(workload.job.sizes.values())
    size = everything + state_bytes(workload.job, 1) + (4 * workload.job.trained if workload.ema else 0)
    share = -(-size // ranks)
    return Storage(size, share, share / COPY if workload.device == "cuda" else share / 5e9, share / disk)
