"""Triton kernels that step a whole flat at once: every statistic in one pass, however many fragments lie in it.

A flat's geometry never changes, so it is laid down once in tables on the device (`tables`): a program reads its record
and knows its elements. No host synchronisation, no floating-point atomics: partial sums have places of their own and
are added in a fixed order, so the same step gives the same bits. The torch path of each optimizer is the reference.

Nothing here imports triton before it is needed: CUDA builds of torch bring it, others may do without.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import warnings
from typing import Any

import torch

from vitds.errors import UserError

CHOICES = ("auto", "torch", "triton")


def chosen(choice: str, tensor: torch.Tensor) -> bool:
    """Whether a flat is stepped by these kernels.

    Args:
        choice: "torch", "triton", or "auto": triton on CUDA where it works.
        tensor: the flat's.

    Raises:
        UserError: "triton" where it cannot be used.
    """
    assert choice in CHOICES, choice
    if choice == "torch" or (choice == "auto" and not tensor.is_cuda):
        return False
    why_not = trouble_with(tensor.device)
    if why_not and choice == "triton":
        raise UserError(f"kernels 'triton' cannot step a tensor on {tensor.device}: {why_not}")
    return not why_not


@functools.cache
def trouble_with(device: torch.device) -> str:
    """Why Triton's kernels cannot run on a device, "" if they can; found once by running a small one."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it is not a CUDA device (TRITON_INTERPRET=1 would interpret the kernels)"
    from vitds.optim.kernels.device import probe

    try:
        counts = torch.zeros(4, dtype=torch.int32, device=device)
        launch(probe, 1, counts)
        assert counts.tolist() == [0, 1, 2, 3]
    except Exception as error:  # no compiler on the host, a driver too old: the torch path serves
        warnings.warn(f"optimizer steps go without Triton's kernels on {device}, slower: {error}", stacklevel=2)
        return f"{type(error).__name__}: {error}"
    return ""


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """One launch; none for no programs. The first argument is a tensor of the device that shall run it."""
    if programs:
        where = torch.cuda.device(arguments[0].device) if arguments[0].is_cuda else contextlib.nullcontext()
        with where:
            kernel[(programs,)](*arguments, **constants)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A bf16 tensor's bits as int16, flattened: the kernels widen and round in integers; others as they are."""
    flat = tensor.view(-1)
    return flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat
