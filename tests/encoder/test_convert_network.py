"""What is packed and what is refused, by name and with the reason."""

import pytest
import timm
from torch import nn

from spark_fast import pack
from spark_fast.encoder import UnsupportedLayerError
from spark_fast.encoder.context import EncoderContext
from spark_fast.encoder.convert_network import MASKED, PACKED, convert_layers
from spark_fast.encoder.layers.converted import ConvertedLayer
from spark_fast.encoder.layers.layer_norm import ChannelNorm
from tests.encoder.halving import Halving


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.Conv2d(3, 3, 3), "kernel 3x3, stride 1, padding 0 and 0 do not turn a map into one 1 times smaller"),
        (nn.Conv2d(3, 3, 3, stride=(2, 1), padding=1), r"stride=\(2, 1\) is not square"),
        (nn.MaxPool2d(2, return_indices=True), "return_indices"),
        (nn.AdaptiveAvgPool2d(7), "of unknown kind"),
        (nn.ReflectionPad2d(1), "of unknown kind"),
        (nn.Sequential(nn.ZeroPad2d(1), nn.ReLU()), "padding not followed by a convolution or pooling"),
        (nn.Sequential(nn.ConstantPad2d(1, 2.0), nn.Conv2d(3, 3, 3)), "padded with 2.0"),
        (nn.LSTM(3, 3), "recurrent"),
        (nn.MultiheadAttention(4, 1), "attention"),
    ],
)
def test_a_layer_that_cannot_be_packed_is_refused_by_name(layer, reason):
    network = nn.Sequential(nn.Conv2d(3, 3, 1), layer)
    with pytest.raises(UnsupportedLayerError, match=r"cannot be packed: 1[.01]* \(") as refused:
        convert_layers(network, PACKED, EncoderContext(dense=False))
    assert refused.match(reason)
    assert type(network[0]) is nn.Conv2d, "a refused network must stay as it was"


def test_a_layer_that_finds_less_than_a_patch_is_refused_and_all_is_put_back():
    network = Halving(extra=nn.Sequential(nn.Conv2d(8, 8, 2, 2), nn.Upsample(scale_factor=2)))
    with pytest.raises(UnsupportedLayerError, match=r"extra.0 \(Conv2d\): .* does not divide the 1 cells of a patch"):
        pack(network, (64, 64))
    assert type(network.stem) is nn.Conv2d


@pytest.mark.parametrize("table", [PACKED, MASKED], ids=["packed", "masked"])
def test_a_converted_layer_knows_its_path_its_own_type_and_the_context_of_its_network(table):
    context = EncoderContext(dense=table is MASKED)
    network, _ = convert_layers(timm.create_model("resnetblur18", features_only=True), table, context)
    converted = {path: m for path, m in network.named_modules() if isinstance(m, ConvertedLayer)}
    assert {m.original_type() for m in converted.values()} >= {nn.Conv2d, nn.MaxPool2d}
    for path, module in converted.items():
        assert module.layer_path == path
        assert module.context is context
        assert isinstance(module, module.original_type())


def test_a_layer_used_in_two_places_stays_one():
    shared = nn.Conv2d(8, 8, 3, padding=1)
    network, undo = convert_layers(nn.Sequential(shared, nn.ReLU(), shared), PACKED, EncoderContext(dense=False))
    assert network[0] is network[2]
    assert isinstance(network[0], ConvertedLayer)
    undo()
    assert network[0] is network[2] is shared


def test_a_padding_layer_used_in_two_places_is_taken_over_in_both_or_refused():
    pad, context = nn.ZeroPad2d(1), EncoderContext(dense=False)
    both = nn.Sequential(pad, nn.Conv2d(3, 3, 3), pad, nn.Conv2d(3, 3, 3))
    network, _ = convert_layers(both, PACKED, context)
    assert [network[i].folded_padding for i in (1, 3)] == [(1, 1, 1, 1)] * 2
    with pytest.raises(UnsupportedLayerError, match="padding not followed by a convolution or pooling"):
        convert_layers(nn.Sequential(pad, nn.Conv2d(3, 3, 3), pad, nn.ReLU()), PACKED, context)


def test_norms_that_a_product_reads_are_known_in_a_convnext():
    """Autocast may round those; the stem's feeds the residual stream, which stays fp32."""
    network = timm.create_model("convnext_zepto_rms", norm_layer="layernorm", features_only=True)
    network, _ = convert_layers(network, PACKED, EncoderContext(dense=False))
    norms = {path: norm.rounded for path, norm in network.named_modules() if isinstance(norm, ChannelNorm)}
    assert {path for path, rounded in norms.items() if not rounded} == {"stem_1"}
    assert {path.rsplit(".", 1)[-1] for path, rounded in norms.items() if rounded} == {"norm", "0"}
