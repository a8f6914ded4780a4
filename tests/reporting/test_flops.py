"""Multiply-adds against those of the literature, and against what the encoders compute."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spark_fast import build_spark
from spark_fast.reporting.flops import Cost, count

pytestmark = pytest.mark.usefixtures("one_thread")


def computed(model):
    """Multiply-adds of the encoder and of all, counted while they run."""
    images = torch.zeros(1, 3, *model.input_size)
    visible = torch.arange(model.num_visible)[None]
    model.eval()
    found = []
    for call in (model.encode, model.reconstruct):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call(images, visible)
        found.append(counter.get_total_flops() / 2)
    return found


def test_resnet50_costs_what_is_known_of_it():
    with torch.device("meta"):
        model = build_spark("resnet50", check=False)
    cost = count(model)
    assert cost.whole / 1e9 == pytest.approx(4.1, abs=0.05), "He et al. count 3.8 for a first stride in the 1x1 layers"
    assert cost.encoder == cost.whole * 20 / 49
    assert cost.decoder / 1e9 == pytest.approx(12.2, abs=0.1)
    assert cost.flop_per_image == 6 * (cost.encoder + cost.decoder)


def test_it_is_what_the_packed_encoder_computes_and_the_masked_one_computes_the_whole():
    packed, masked = (build_spark("resnet10t", input_size=96, decoder_width=32, encoder=e, check=False)
                      for e in ("packed", "masked"))  # fmt: skip
    for block in (*packed.decoder.dec, *masked.decoder.dec):
        block.merge = False
    packed.sparse_projections = masked.sparse_projections = False
    cost = count(packed)
    assert count(masked) == cost
    encoder, everything = computed(packed)
    assert (encoder, everything - encoder) == pytest.approx((cost.encoder, cost.decoder))
    encoder, everything = computed(masked)
    assert (encoder, everything - encoder) == pytest.approx((cost.whole, cost.decoder))


def test_a_decoder_whose_layers_are_merged_costs_the_same_and_stays_merged():
    model = build_spark("resnet10t", input_size=96, decoder_width=32, check=False)
    cost = count(model)
    for block in model.decoder.dec:
        block.merge = True
    assert count(model) == cost
    assert all(block.merge for block in model.decoder.dec)


def test_halos_and_canvases_are_no_part_of_the_task():
    model = build_spark("convnext_zepto_rms", input_size=96, decoder_width=32, check=False)
    cost = count(model)
    assert cost.encoder < computed(model)[0] < cost.whole


def test_counting_leaves_the_model_as_it_was():
    model = build_spark("resnet10t", input_size=64, mask_ratio=0.5, decoder_width=32, check=False).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    assert isinstance(count(model), Cost)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_more_channels_cost_what_the_first_layer_and_the_last_take_more_for_them():
    options = {"input_size": 64, "decoder_width": 32, "check": False}
    three, twelve = (build_spark("test_resnet", in_chans=n, **options) for n in (3, 12))
    first = twelve.encoder.network.conv1[0]
    side = 64 // first.stride[0]
    more = 9 * first.out_channels * first.kernel_size[0] ** 2 * side**2
    assert count(twelve).whole - count(three).whole == more
    assert count(twelve).decoder - count(three).decoder == 9 * twelve.decoder.proj.in_channels * 64**2
