"""Triton's kernels are interpreted where there is no GPU: it must be told so before it is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def kernel_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device on which `kernels = "triton"` works: a GPU, or the CPU interpreting them."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    from vitds.optim import kernels

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels.trouble_with.cache_clear()
    yield torch.device("cpu")
    kernels.trouble_with.cache_clear()


def _import_interpreted() -> None:
    """Decorated functions are interpreted if the word is given while they are made; children shall not inherit it."""
    given = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        from tests.optim import rounding_kernel  # noqa: F401
        from vitds.optim.kernels import adafactor  # noqa: F401
    except ImportError:  # no triton here: its tests skip
        pass
    finally:
        if given is None:
            del os.environ["TRITON_INTERPRET"]


if not torch.cuda.is_available():
    _import_interpreted()
