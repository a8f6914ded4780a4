"""What the decoder's choices cost on a GPU, and that it chooses the cheaper."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from spark_fast.decoder.densify import sparse_pays
from spark_fast.decoder.gpu_costs import EDGE_LAUNCHES, TABLE_LAUNCHES, DecoderRates, merging_costs, projection_costs
from spark_fast.decoder.upsample import merging_pays

FREE = DecoderRates(memory=1e30, rows=1e30, products=1e30, launch=1e30)  # none but the constant that is set costs


def on_cuda(n, c, side):
    with FakeTensorMode():
        return torch.empty(n, c, side, side, device="cuda")


def test_merging_saves_four_taps_of_thirteen_and_the_map_between():
    """(2, 8, 3, 5) -> (2, 8, 6, 10): 120 pixels out, 30 in."""
    work = 2 * 8 * 8  # FLOPs of a tap
    edges, merge = 3 * 4 * 2 * (3 + 5) * 5, (18 * 18 + 2 * 144) * 8
    costs = merging_costs(2, 3, 5, 8, FREE._replace(products=1.0, launch=0.0))
    assert costs["apart"] == pytest.approx(3 * 13 * 120 * work)
    assert costs["merged"] == pytest.approx((3 * 9 * 120 + edges + merge) * work)
    costs = merging_costs(2, 3, 5, 8, FREE._replace(memory=1.0, launch=0.0))
    assert costs["apart"] == pytest.approx(3 * (30 + 3 * 120) * 8 * 2)
    assert costs["merged"] == pytest.approx(3 * (30 + 120) * 8 * 2)
    costs = merging_costs(2, 3, 5, 8, FREE._replace(launch=1.0))
    assert costs == pytest.approx({"merged": EDGE_LAUNCHES, "apart": 0.0})


def test_a_projection_from_the_visible_cells_multiplies_their_share_and_moves_nine_of_each():
    work = 3 * 2 * 9 * 100 * 8 * 4
    costs = projection_costs(100, 0.4, 8, 4, FREE._replace(products=1.0, launch=0.0))
    assert costs == pytest.approx({"all": work, "visible": 0.4 * work})
    costs = projection_costs(100, 0.4, 8, 4, FREE._replace(rows=1.0, launch=0.0))
    assert costs == pytest.approx({"all": 0.0, "visible": 2 * (400 + 3 * 9 * 0.4 * 400)})
    costs = projection_costs(100, 0.4, 8, 4, FREE._replace(launch=1.0))
    assert costs == pytest.approx({"all": 0.0, "visible": TABLE_LAUNCHES})


def test_on_a_gpu_the_cheaper_is_chosen():
    """ResNet-50's, batch 256: the widest block has too few pixels to merge, the finest level too few channels."""
    for block, merged in enumerate([False, True, True, True, True]):
        x = on_cuda(256, 768 >> block, 7 << block)
        costs = merging_costs(256, 7 << block, 7 << block, 768 >> block)
        assert (costs["merged"] < costs["apart"]) is merged
        assert merging_pays(x, 768 >> block) is merged
    for level, visible in ((1, True), (2, True), (3, False)):
        x, width = on_cuda(5120, 2048 >> level, 1 << level), 768 >> level
        costs = projection_costs(256 * 49 * 4**level, 20 / 49, 2048 >> level, width)
        assert (costs["visible"] < costs["all"]) is visible
        assert sparse_pays(x, 20 / 49, width) is visible
