"""Weights in a model of another resolution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import zoom

from vitds.errors import UserError
from vitds.models import resample_position_embedding


@pytest.mark.parametrize(("old", "new"), [(16, 37), (16, 8), (4, 5)])
def test_resampling_is_the_reference_s_zoom(old, new):
    value = torch.randn(1, old * old, 6, generator=torch.Generator().manual_seed(0))
    grid = value.view(old, old, 6).numpy()
    wanted = zoom(grid, (new / old, new / old, 1), order=1)
    found = resample_position_embedding(value, new * new).view(new, new, 6).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_grids_must_be_square():
    with pytest.raises(UserError, match="not square"):
        resample_position_embedding(torch.zeros(1, 15, 4), 16)
