"""What the kernels share: bf16 in integers, random bits, the weights' last step. Runs on the device.

bf16 tensors come as int16. Rounding is done on the bits, so that a compiler, a device and an interpreter agree on it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def probe(counts: tl.tensor) -> None:
    """0, 1, 2, 3."""
    lane = tl.arange(0, 4)
    tl.store(counts + lane, lane)


@triton.jit
def widened(values: tl.tensor) -> tl.tensor:
    """fp32 of fp32, or of bf16 given as int16."""
    if values.dtype == tl.int16:
        return (values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return values


@triton.jit
def upper_half(word: tl.tensor, values: tl.tensor) -> tl.tensor:
    """The upper 16 bits as int16; a NaN stays one, whatever was added to its bits."""
    half = tl.where(values == values, word >> 16, 0x7FC0)
    return half.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def nearest(values: tl.tensor) -> tl.tensor:
    """fp32 rounded to the nearest bf16, ties to even, as int16."""
    word = values.to(tl.uint32, bitcast=True)
    return upper_half(word + 0x7FFF + ((word >> 16) & 1), values)


@triton.jit
def philox(low: tl.tensor, high: tl.tensor, key: tl.tensor) -> tl.tensor:
    """Philox-2x32 of 7 rounds on uint32, as vitds.optim.rounding.philox."""
    multiplier = tl.full((), 0xD256D193, tl.uint32)
    weyl = tl.full((), 0x9E3779B9, tl.uint32)
    for _ in tl.static_range(7):
        upper = tl.umulhi(low, low * 0 + multiplier)
        lower = low * multiplier
        low = upper ^ high ^ key
        high = lower
        key = key + weyl
    return low, high


@triton.jit
def stochastic(values: tl.tensor, element: tl.tensor, a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """fp32 rounded to bf16 at random, as int16; see vitds.optim.rounding."""
    low = (element & 0xFFFFFFFF).to(tl.uint32)
    high = (element >> 32).to(tl.uint32) ^ b
    random, _ = philox(low, high, low * 0 + a)
    return upper_half(values.to(tl.uint32, bitcast=True) + (random & 0xFFFF), values)


@triton.jit
def stream_of(low: tl.tensor, high: tl.tensor, step: tl.tensor) -> tl.tensor:
    """(a, b) of an update of a parameter from its name's words, int64 scalars."""
    return philox(low.to(tl.uint32), high.to(tl.uint32), step.to(tl.uint32))


@triton.jit
def move(
    weights: tl.tensor,
    at: tl.tensor,
    mask: tl.tensor,
    change: tl.tensor,
    lr: tl.tensor,
    decay: tl.tensor,
    element: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
) -> None:
    """θ ← θ − lr·(change + decay·θ), rounded stochastically if θ is bf16. `element`, a and b serve its rounding."""
    stored = tl.load(weights + at, mask=mask)
    theta = widened(stored)
    theta = theta - lr * (change + decay * theta)
    if stored.dtype == tl.int16:
        tl.store(weights + at, stochastic(theta, element, a, b), mask=mask)
    else:
        tl.store(weights + at, theta, mask=mask)
