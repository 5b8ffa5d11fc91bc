"""Devices by name: how much memory they have, how fast they compute and move bytes. Data sheets' numbers, none measured here.

Peaks are dense 16-bit tensor-core FLOP/s (vitds.metrics.speed has them, with their sources). Memory is what torch reports
as the device's total, which is less than the name says: the driver keeps some.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vitds.errors import UserError, one_of
from vitds.host_memory import available_bytes
from vitds.metrics.speed import named_peak
from vitds.planning.scaling import Machine

GIB = 2**30
CPU_FLOPS, CPU_BANDWIDTH = 1e11, 2e10
"""Of a few cores: assumed, so that a forecast for a CPU has an order of magnitude."""


@dataclass(frozen=True)
class Device:
    """One accelerator (or one rank's share of a host), with what bounds a step on it."""

    name: str
    kind: str
    """cuda or cpu."""
    memory_bytes: int
    """What torch may use at most; 0 where nothing is known."""
    peak_flops: float
    """Dense FLOP/s in 16 bits."""
    bandwidth: float
    """Bytes a second of its own memory."""
    intra: float = 0.0
    """Bytes a second that it sends to others of its host; 0: not known."""
    gpus_per_host: int = 8

    def machine(self, **others: float) -> Machine:
        """The hosts that such devices stand in, for communication; `others` are Machine's own fields."""
        known = {"peak_flops": self.peak_flops, "gpus_per_host": self.gpus_per_host}
        if self.intra:
            known["intra"] = self.intra
        return Machine(**{**known, **others})  # type: ignore[arg-type]


# Memory: torch's own messages ("has a total capacity of …"), rounded down. Bandwidth and links: the makers' data sheets;
# B200's bandwidth follows from its bus as the driver reports it (7680 bits at 3996 MHz; pytorch/ao pull request 4002).
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("h100", "cuda", int(79.0 * GIB), 989e12, 3.35e12, 450e9),
        Device("h100-pcie", "cuda", int(79.0 * GIB), 756e12, 2.0e12, 64e9),
        Device("h200", "cuda", int(139.0 * GIB), 989e12, 4.8e12, 450e9),
        Device("b200", "cuda", int(178.0 * GIB), 2250e12, 7.67e12, 900e9),
        Device("a100-80", "cuda", int(79.0 * GIB), 312e12, 2.039e12, 300e9),
        Device("a100-40", "cuda", int(39.4 * GIB), 312e12, 1.555e12, 300e9),
        Device("l40s", "cuda", int(44.3 * GIB), 362e12, 0.864e12, 32e9),
        Device("mi300x", "cuda", int(191.0 * GIB), 1307e12, 5.3e12, 448e9),
        Device("cpu", "cpu", 0, CPU_FLOPS, CPU_BANDWIDTH),
    )
}


def device(name: str, ranks_per_host: int = 1) -> Device:
    """A device by name; "cpu" is a rank's share of this host's free memory.

    Args:
        ranks_per_host: ranks that share the host's memory, for "cpu".

    Raises:
        UserError: a name that is not in the table.
    """
    found = DEVICES.get(name.lower())
    if found is None:
        raise UserError(one_of("--device", name, DEVICES))
    return replace(found, memory_bytes=available_bytes() // ranks_per_host) if found.kind == "cpu" else found


def local_device() -> Device | None:
    """This process's own GPU, its memory measured; None without one, or where its peak is not known."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    peak = named_peak(properties.name, "bf16")
    if peak is None:
        return None
    alike = min(
        (known for known in DEVICES.values() if known.kind == "cuda" and known.peak_flops == peak.flops),
        key=lambda known: abs(known.memory_bytes - properties.total_memory),
        default=None,
    )
    bandwidth, intra = (alike.bandwidth, alike.intra) if alike else (peak.flops / 300, 0.0)
    return Device(properties.name, "cuda", properties.total_memory, peak.flops, bandwidth, intra)
