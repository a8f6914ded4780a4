"""Visible patches for tests: some, and any."""

import torch
from hypothesis import strategies as st

from spark_fast.encoder import VisiblePatches
from spark_fast.masking import sample_visible


def some_visible(grid=(3, 4), batch=2, keep=5):
    """Each image another mask."""
    return VisiblePatches(sample_visible(0, 0, torch.arange(batch), grid, keep), grid)


@st.composite
def masks(draw):
    batch, h, w = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    keep = draw(st.integers(1, h * w))
    keys = torch.rand(batch, h * w, generator=torch.Generator().manual_seed(draw(st.integers(0, 10**6))))
    index = keys.argsort(1)[:, :keep].sort(1).values
    return VisiblePatches(index, (h, w))
