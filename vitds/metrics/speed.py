"""How fast a run is and how near that is to what the device could do: images/s, waiting for data, MFU, peak memory."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

# Dense bf16 and fp16 tensor-core FLOP/s from the makers' data sheets (which often print twice that, "with sparsity").
# TF32 has half of it on all of these. The first name found in the driver's wins, so the narrower one comes first.
PEAKS_16_BIT: dict[str, float] = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
    "B100": 1750e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "MI300X": 1307e12,
}


class SpeedSettings(Protocol):
    """The keys of the run file that speed is measured by."""

    @property
    def peak_tflops(self) -> float | None: ...

    @property
    def tf32(self) -> bool: ...


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one device and where the number comes from; printed, so that an MFU can be read."""

    flops: float
    name: str


def device_peak(device: torch.device, precision: str, peak_tflops: float | None = None) -> Peak | None:
    """The peak of this rank's device, or None where it is not known and MFU is left out.

    Args:
        precision: "bf16", "fp16", "tf32" or "fp32", the arithmetic of the matrix products.
        peak_tflops: the user's own number, dense TFLOP/s.
    """
    if peak_tflops is not None:
        return Peak(peak_tflops * 1e12, f"{peak_tflops:g} TFLOP/s as given by peak_tflops")
    return named_peak(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def named_peak(device_name: str, precision: str) -> Peak | None:
    """The peak of a device by the name its driver gives, "NVIDIA H100 80GB HBM3", or the user; None if not in the table."""
    for name, flops in PEAKS_16_BIT.items():
        # A name stands alone, so that A10 is found neither in A100 nor in A10G.
        if not re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", device_name, re.IGNORECASE):
            continue
        if precision == "fp32":  # not made on tensor cores
            return None
        flops /= 2 if precision == "tf32" else 1
        return Peak(flops, f"{flops / 1e12:g} TFLOP/s, {name} {precision} dense")
    return None


def mfu(images_per_second: float, flops_per_image: float, world_size: int, peak: Peak) -> float:
    """Model FLOPs utilisation, 0 to 1 (PaLM, arXiv 2204.02311 appendix B).

    Training costs three times the forward pass: the backward pass computes gradients of activations and of weights.
    What activation checkpointing computes again does not count.

    Args:
        images_per_second: of the whole world.
        flops_per_image: of one forward pass, 2 per multiply-add.
    """
    return 3 * flops_per_image * images_per_second / (world_size * peak.flops)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held: on a GPU in torch's tensors, on a CPU resident in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:  # ru_maxrss may be the parent's, taken over at fork
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20  # type: ignore[index]
    except (OSError, TypeError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Throughput:
    """Images per second of training, and the share of that time spent waiting for data. The first step, which compiles,
    does not count.

    Take `rates` only after a number was read back from the device (the loss, say), so that the work counted is done.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._warm = False
        self.restart()

    def restart(self) -> None:
        """Forget what was counted."""
        self._since = self._clock()
        self._images = 0
        self._waited = self._paused = 0.0

    def count(self, images: int) -> None:
        """`images` of all ranks have been trained on."""
        if self._warm:
            self._images += images
        else:
            self._warm = True
            self.restart()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the call that fetches the next batch."""
        begin = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around evaluation and saving: time that is not training's."""
        begin = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - begin

    def rates(self) -> dict[str, float]:
        """perf/images_per_second and perf/data_wait since the last call; {} if nothing was counted since."""
        seconds = self._clock() - self._since - self._paused
        rates = {}
        if self._images and seconds > 0:
            rates = {
                "perf/images_per_second": self._images / seconds,
                "perf/data_wait": min(1.0, self._waited / seconds),
            }
        self.restart()
        return rates


class Speedometer(Throughput):
    """The perf/ metrics of one rank's training loop.

    Args:
        flops_per_image: of one forward pass.
        world_size: ranks that share the images counted.
        precision: dtype of the model's weights.
        device: of this rank.
        settings: `peak_tflops` names the device's peak, `tf32` tells how fp32 products are made.
    """

    def __init__(
        self,
        flops_per_image: float,
        world_size: int,
        precision: torch.dtype,
        device: torch.device,
        settings: SpeedSettings,
    ) -> None:
        super().__init__()
        self._flops, self._world_size, self._device = flops_per_image, world_size, device
        kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(precision, "tf32" if settings.tf32 else "fp32")
        self.peak = device_peak(device, kind, settings.peak_tflops)

    def describe(self) -> str:
        """What perf/mfu is measured against."""
        return (
            f"MFU against {self.peak.name}"
            if self.peak
            else "no MFU: this device's peak is unknown; set vitds.train.peak_tflops"
        )

    def row(self) -> dict[str, float]:
        """Images per second, waiting, MFU where the peak is known, and peak memory, since the last call."""
        row = self.rates()
        if self.peak is not None and row:
            row["perf/mfu"] = mfu(row["perf/images_per_second"], self._flops, self._world_size, self.peak)
        return {**row, "perf/peak_memory_gib": peak_memory_gib(self._device)}
