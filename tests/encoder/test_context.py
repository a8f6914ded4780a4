"""What the layers of an encoder share: means per image over the visible cells."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_fast.encoder.context import EncoderContext
from tests.encoder.masks import masks


@given(masks(), st.sampled_from([1, 2, 4]))
@settings(max_examples=40)
def test_the_mean_of_an_image_is_over_its_visible_cells_packed_or_masked(visible, b):
    packed, dense = EncoderContext(dense=False), EncoderContext(dense=True)
    packed.visible = dense.visible = visible
    h, w = visible.grid
    maps = torch.randn(visible.batch, 3, h * b, w * b, dtype=torch.float64)
    cells = visible.cells(h * b)
    expected = (maps * cells).sum((2, 3), keepdim=True) / cells.sum((2, 3), keepdim=True)  # (B, C, 1, 1)
    torch.testing.assert_close(dense.image_mean(maps), expected)
    means = packed.image_mean(visible.pack(maps))
    assert means.shape == (visible.count, 3, 1, 1)
    torch.testing.assert_close(means, expected.repeat_interleave(visible.num_visible, 0))


@pytest.mark.parametrize("dense", [False, True])
def test_in_a_dense_call_it_is_over_all_cells(dense):
    x = torch.randn(2, 3, 4, 5)
    context = EncoderContext(dense)
    assert torch.equal(context.image_mean(x), x.mean((2, 3), keepdim=True))
    assert torch.equal(context.reduce_images(x, lambda t: t.amax((2, 3), keepdim=True)), x.amax((2, 3), keepdim=True))
