"""Stochastic rounding of bf16 master weights, with random bits that depend on the element and on nothing around it.

A weight w between two neighbouring bf16 numbers becomes the upper one with probability (w − lower)/(upper − lower), so
updates far below bf16's spacing arrive on average instead of never. The bits come from Philox-2x32 of 7 rounds (Salmon,
Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011; 7 is the least that passes BigCrush there):

    (a, b) = philox(counter = first 64 bits of BLAKE2b(seed, name), key = step)
    bits of element i of the whole parameter = philox(counter = (i mod 2³², ⌊i/2³²⌋ xor b), key = a)

and the low 16 bits of the first word are used. So neither the world size nor the cut changes a bit; vitds.optim.kernels
computes the same in Triton.
"""

from __future__ import annotations

import hashlib

import torch

from vitds.layout import Flat

ROUNDS = 7
MULTIPLIER = 0xD256D193
WEYL = 0x9E3779B9
WORD = 0xFFFFFFFF
AT_ONCE = 2**20
"""Elements that the torch path rounds at a time: it works in int64, several times the size of what it rounds."""


def name_key(seed: int, name: str) -> tuple[int, int]:
    """Two 32-bit words for a parameter, low word first."""
    digest = int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "little")
    return digest & WORD, digest >> 32


def philox(low: torch.Tensor, high: torch.Tensor, key: int, rounds: int = ROUNDS) -> tuple[torch.Tensor, torch.Tensor]:
    """Philox-2x32 of counters (high, low), 32-bit words in int64."""
    for _ in range(rounds):
        product = low * MULTIPLIER  # may wrap below zero; its 64 bits are right
        low, high = ((product >> 32) & WORD) ^ high ^ key, product & WORD
        key = (key + WEYL) & WORD
    return low, high


def stream_of(names: tuple[int, int], step: int) -> tuple[int, int]:
    """(a, b) of the module's equations: what tells one update of one parameter from all others."""
    low, high = (torch.tensor([word], dtype=torch.int64) for word in names)
    a, b = philox(low, high, step & WORD)
    return int(a), int(b)


def stochastically(values: torch.Tensor, first: int, stream: tuple[int, int]) -> torch.Tensor:
    """fp32 values (n,) of elements first, first + 1, … of a parameter, rounded to bf16."""
    element = torch.arange(first, first + values.numel(), device=values.device)
    random, _ = philox(element & WORD, (element >> 32) ^ stream[1], stream[0])
    rounded = ((values.contiguous().view(torch.int32) + (random & 0xFFFF).int()) & -0x10000).view(torch.float32)
    return torch.where(values.isnan(), values, rounded).bfloat16()  # NaN's bits must not wrap into a number


def store(flat: Flat, seed: int, step: int, offset: int, target: torch.Tensor, values: torch.Tensor) -> None:
    """Writes fp32 values (n,) into a bf16 flat's elements from `offset` on; what no fragment covers rounds to nearest.

    Args:
        flat: says which parameter's elements these are.
        seed: the optimizer's `rounding_seed`.
        step: number of the update, from 1.
        offset: of the first value in the flat.
        target: the flat's elements, bf16 (n,).
        values: fp32 (n,).
    """
    target.copy_(values)
    for f in flat.fragments:
        begin, end = max(f.offset, offset), min(f.offset + f.numel, offset + values.numel())
        if begin >= end:
            continue
        stream = stream_of(name_key(seed, f.name), step)
        for at in range(begin, end, AT_ONCE):
            part = slice(at - offset, min(at + AT_ONCE, end) - offset)
            target[part] = stochastically(values[part], f.start + at - f.offset, stream)
