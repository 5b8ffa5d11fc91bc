"""Triton's kernels are interpreted where there is no GPU (tests/conftest.py)."""

from __future__ import annotations

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
