"""How the work of a kernel is cut: no lane idle where channels allow it, and enough programs for a large GPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton has no build for this platform")

from spark_fast.encoder.conv.kernels.tile import PROCESSORS, WAVES, channel_tile, product_tiles, row_tile, rows_of


@given(st.integers(1, 5000), st.sampled_from([32, 64, 128]))
def test_a_tile_is_a_power_of_two_of_channels_that_divides_them_where_one_of_32_or_more_does(channels, largest):
    tile = channel_tile(channels, largest)
    assert tile & (tile - 1) == 0
    assert tile <= largest
    if channels % 32 == 0:
        assert channels % tile == 0
        assert tile >= 32
    else:
        assert tile >= min(channels, largest)


@given(st.integers(1, 10**7), st.integers(1, 64), st.sampled_from([32, 64, 256]))
def test_rows_per_tile_are_halved_until_there_is_work_for_the_whole_device(rows, channel_tiles, most):
    tile = row_tile(rows, channel_tiles, most)
    programs = -(-rows // tile) * channel_tiles
    assert 16 <= tile <= most
    assert programs >= WAVES or tile == 16
    assert tile == most or -(-rows // (2 * tile)) * channel_tiles < WAVES, "no smaller than it must be"


@given(st.integers(1, 10**6), st.integers(1, 4096), st.integers(1, 4096), st.sampled_from([2, 4]))
def test_tiles_of_a_product_suit_tensor_cores_and_its_size(rows, columns, depth, element):
    high, wide, deep, warps = product_tiles(rows, columns, depth, element)
    for tile, largest in ((high, 512 // element), (wide, 128), (deep, 128 // element)):
        assert tile & (tile - 1) == 0
        assert 16 <= tile <= largest
    assert high * wide <= 128 * 32 * warps, "sums per thread"
    assert depth % 32 or depth % deep == 0
    programs = -(-rows // high) * -(-columns // wide)
    assert programs >= PROCESSORS or high <= 64


def test_more_rows_than_int32_can_number_are_refused():
    rows_of(torch.empty(2**30 - 1, 4, device="meta"))
    with pytest.raises(ValueError, match="more than 2\\^30 rows, too many for the GPU kernels: use a smaller batch"):
        rows_of(torch.empty(2, 2), torch.empty(2**29, 2, 4, device="meta"))
