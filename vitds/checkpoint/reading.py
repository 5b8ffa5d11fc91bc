"""From stored tensors into the shards that ranks hold: everything is known to fit before anything is read."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from vitds import dist
from vitds.checkpoint.tensorfile import StoredTensor, TensorSpec, read_elements
from vitds.errors import UserError, nearest
from vitds.layout import Shard

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def mismatches(stored: Mapping[str, TensorSpec], shards: list[Shard], *, exact: bool) -> list[str]:
    """One sentence per shard that what is stored does not fit.

    Args:
        stored: by name.
        shards: to be filled.
        exact: dtypes must be equal; otherwise any of FLOATS will be cast.
    """
    problems = []
    for shard in shards:
        there = stored.get(shard.name)
        if there is None:
            problems.append(f"no tensor {shard.name!r} there{nearest(shard.name, stored)}")
        elif there.shape != tuple(shard.shape):
            problems.append(f"tensor {shard.name!r} has shape {there.shape} there and {tuple(shard.shape)} here")
        elif exact and there.dtype != shard.data.dtype:
            problems.append(f"tensor {shard.name!r} is {there.dtype} there and {shard.data.dtype} here")
        elif not exact and there.dtype not in FLOATS:
            problems.append(f"tensor {shard.name!r} is {there.dtype} there; weights are float32, bfloat16 or float16")
    return problems


def agree(problems: list[str], path: Path) -> None:
    """Refuse on all ranks what the first rank with a problem refuses. Collective; UserError."""
    dist.together(lambda: refuse(problems, path))


def refuse(problems: list[str], path: Path) -> None:
    """UserError with the first problems, if there are any."""
    if problems:
        more = f"; and {len(problems) - 3} more like these" if len(problems) > 3 else ""
        raise UserError(f"{path}: {'; '.join(problems[:3])}{more}")


def read_together(wanted: list[tuple[StoredTensor, Shard]], path: Path) -> None:
    """Fill each shard from its tensor; what fails on one rank is raised on all (UserError). Collective."""
    problems = []
    try:
        read(wanted)
    except (UserError, OSError) as error:
        problems.append(str(error))
    agree(problems, path)


def read(wanted: list[tuple[StoredTensor, Shard]]) -> None:
    """Fill the shards in the order in which the files are laid out, one file open at a time."""
    file: BinaryIO | None = None
    with contextlib.ExitStack() as stack:
        opened: Path | None = None
        for there, shard in sorted(wanted, key=lambda pair: (pair[0].path, pair[0].offset, pair[1].start)):
            if shard.data.numel() == 0:
                continue
            if file is None or opened != there.path:
                stack.close()
                file, opened = stack.enter_context(open(there.path, "rb", buffering=0)), there.path
            read_elements(file, there, shard.start, shard.data)


def read_one(
    stored: Mapping[str, StoredTensor], name: str, start: int, numel: int | None, dtype: torch.dtype | None, path: Path
) -> torch.Tensor:
    """Elements [start, start + numel) of one tensor: (numel,) on the CPU, in the stored dtype or cast to `dtype`.

    Raises:
        UserError: no such tensor, one that is not of floats and is to be cast, a file that has become shorter.
    """
    if name not in stored:
        raise UserError(f"{path}: no tensor {name!r} there{nearest(name, stored)}")
    spec = stored[name].spec
    numel = spec.numel - start if numel is None else numel
    data = torch.empty(numel, dtype=dtype or spec.dtype)
    shard = Shard(name, spec.shape, data, start)
    if dtype is not None:
        refuse(mismatches({name: spec}, [shard], exact=False), path)
    read([(stored[name], shard)])
    return data
