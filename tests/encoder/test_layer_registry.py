"""The kind of a layer: by its type, by what was registered, and refused with the reason."""

import pytest
import timm
import timm.layers as tl
import torch
from timm.models.convnext import ConvNeXtBlock
from torch import nn

from spark_fast import pack, verify
from spark_fast.encoder import UnsupportedLayerError, register
from spark_fast.encoder.layer_registry import LAYER_KINDS, layer_kind, refusal_reason
from spark_fast.encoder.verify import VerificationError
from tests.encoder.halving import Halving


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.ReLU(), "pointwise"),
        (tl.GELU(), "pointwise"),
        (nn.Softmax(1), None),
        (nn.GLU(), None),
        (nn.LayerNorm(3), "layer_norm"),
        (tl.LayerNorm2d(3), "layer_norm"),
        (tl.RmsNorm2d(3), "pointwise"),
        (nn.BatchNorm2d(3), "norm"),
        (tl.BatchNormAct2d(3), "norm"),
        (nn.Conv2d(3, 3, 1), "conv"),
        (tl.StdConv2d(3, 3, 1), "conv"),
        (nn.ConvTranspose2d(3, 3, 2, 2), None),
        (nn.MaxPool2d(2), "pool"),
        (nn.GroupNorm(1, 3), "global_reduction"),
        (tl.SEModule(16), "global_reduction"),
        (nn.AdaptiveAvgPool2d(1), "image_pool"),
        (nn.AdaptiveAvgPool2d((1, 1)), "image_pool"),
        (nn.AdaptiveAvgPool2d(2), None),
        (tl.DropPath(0.1), "per_image"),
        (tl.SplitAttn(8), "block"),
        (ConvNeXtBlock(8), "block"),
        (nn.Upsample(scale_factor=2), "pointwise"),
        (nn.Upsample(scale_factor=1.5), "local"),
        (nn.Upsample(scale_factor=2, mode="bilinear"), "local"),
        (tl.GatherExcite(16, extent=0, use_mlp=False), "global_reduction"),
        (tl.GatherExcite(16, extent=2, use_mlp=False), "local"),
        (nn.Sequential(nn.ReLU()), None),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v),
)
def test_each_type_has_its_kind(layer, kind):
    assert layer_kind(layer) == kind


def test_a_layer_with_a_kind_has_no_reason_to_be_refused_and_a_subclass_has_no_kind():
    assert not [t for t in LAYER_KINDS if refusal_reason(t.__new__(t))]
    assert layer_kind(type("MyConv", (nn.Conv2d,), {})(3, 3, 1)) is None


def test_attention_is_refused_as_such_and_not_layer_by_layer():
    with pytest.raises(UnsupportedLayerError, match=r"xca \(CrossCovarianceAttn\): attention: .*, and 2 more"):
        pack(timm.create_model("edgenext_xx_small", features_only=True))


class ResBlock(nn.Sequential):
    """Named as a token mixer of timm is."""


def test_a_block_of_ones_own_is_not_judged_by_a_common_name():
    assert pack(Halving(extra=ResBlock(nn.Conv2d(8, 8, 3, padding=1))), (32, 32)).patch == 16
    with pytest.raises(UnsupportedLayerError, match=r"blocks.0 \(MixerBlock\): token mixing"):
        pack(timm.create_model("mixer_s32_224", features_only=True))


class EdgeAttention(nn.Module):
    """Named as attention, but a gate."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x * self.gate(x).sigmoid()


class MyAttention(nn.Module):
    """Attention out of layers of known kinds."""

    def __init__(self):
        super().__init__()
        self.project = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        cells = self.project(x).flatten(2)  # (B, C, h, w) -> (B, C, h*w)
        return (cells @ (cells.transpose(1, 2) @ cells).softmax(-1)).view_as(x)


def test_attention_of_ones_own_is_judged_by_what_it_computes_not_by_its_name():
    assert verify(Halving(extra=EdgeAttention())).identity < 1e-9
    with pytest.raises(VerificationError, match="with nothing masked the packed network differs"):
        verify(Halving(extra=MyAttention()))


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x):
        return x * self.gain


def test_a_layer_of_ones_own_is_packed_once_its_kind_is_told(monkeypatch):
    with pytest.raises(UnsupportedLayerError, match=r"extra \(Gain\): of unknown kind \(see spark_fast.encoder.reg"):
        pack(Halving(extra=Gain()), (32, 32))
    monkeypatch.setitem(LAYER_KINDS, nn.ReLU, "pointwise")  # restored after the test, with what register adds
    register("pointwise", Gain)
    try:
        assert pack(Halving(extra=Gain()), (32, 32)).patch == 16
    finally:
        del LAYER_KINDS[Gain]
    with pytest.raises(ValueError, match="unknown kind of layer 'pointy'"):
        register("pointy", Gain)
    with pytest.raises(TypeError, match=r"register takes classes, such as nn.ReLU, got Gain\(\)"):
        register("pointwise", Gain())
