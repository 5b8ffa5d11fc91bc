"""A kernel that only rounds, both ways; imported where it is interpreted (conftest.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from vitds.optim.kernels.device import nearest, stochastic, stream_of


@triton.jit
def both(given, at_random, to_nearest, words, step, COUNT: tl.constexpr):
    """Elements words[2] + i of the parameter whose name's words come first."""
    lane = tl.arange(0, COUNT)
    number = tl.load(given + lane)
    a, b = stream_of(tl.load(words), tl.load(words + 1), step)
    tl.store(at_random + lane, stochastic(number, lane + tl.load(words + 2), a, b))
    tl.store(to_nearest + lane, nearest(number))
