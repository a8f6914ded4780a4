"""Packed equals masked, in loss and every gradient; without a mask either is the dense network."""

import copy

import pytest
import timm
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from spark_fast import build_spark, pack
from spark_fast.encoder import MaskedEncoder, PackedEncoder, VisiblePatches
from spark_fast.encoder.verify import _randomise_constants
from spark_fast.masking import sample_visible


def loss_and_gradients(encoder, images, visible):
    torch.manual_seed(1)
    x = images.clone().requires_grad_()
    features = encoder.train()(x, visible)
    encoder.zero_grad()
    loss = sum((f * torch.linspace(-1, 1, f.numel(), dtype=f.dtype).view(f.shape)).mean() for f in features)
    loss.backward()
    return loss.detach(), [x.grad, *(p.grad for p in encoder.parameters() if p.grad is not None)]


# two images at least: with one cell per channel a batch statistic does not exist; shrinking would take minutes
@given(st.integers(2, 3), st.integers(1, 4), st.integers(1, 3), st.floats(0, 0.95), st.integers(0, 10**6))
@settings(max_examples=4, phases=[Phase.explicit, Phase.generate], database=None)
def test_packed_equals_masked(network, batch, h, w, ratio, seed):
    keep = max(1, round(h * w * (1 - ratio)))
    size = (32 * h, 32 * w)
    images = torch.randn(batch, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    index = sample_visible(seed, 0, torch.arange(batch), (h, w), keep)
    runs = [
        loss_and_gradients(kind(copy.deepcopy(network), size), images, VisiblePatches(index, (h, w)))
        for kind in (PackedEncoder, MaskedEncoder)
    ]
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-10, atol=1e-12)
    assert len(runs[0][1]) == len(runs[1][1])
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm() + 1e-12


@pytest.mark.slow
def test_parameters_and_their_names_are_the_networks(network):
    before = network.state_dict()
    for kind in (PackedEncoder, MaskedEncoder):
        after = kind(copy.deepcopy(network), (64, 64)).network.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[k], before[k]) for k in before)


def test_called_without_a_mask_an_encoder_is_the_dense_network(network):
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    encoder = PackedEncoder(copy.deepcopy(network), (64, 64)).eval()
    features = copy.deepcopy(network).eval()(images)
    for got, expected in zip(encoder(images), [features[i] for i in encoder.levels], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_stochastic_depth_drops_whole_images_alike_in_both_encoders():
    network = timm.create_model("convnext_zepto_rms", features_only=True, drop_path_rate=0.9).double()
    _randomise_constants(network)
    images = torch.randn(6, 3, 64, 64, dtype=torch.float64)
    visible = VisiblePatches(sample_visible(0, 0, torch.arange(6), (2, 2), 2), (2, 2))
    outputs = []
    for kind in (PackedEncoder, MaskedEncoder):
        torch.manual_seed(0)
        outputs.append(kind(copy.deepcopy(network), (64, 64)).train()(images, visible))
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "stages", "backend"),
    [
        pytest.param("resnet10t", 2, "inductor", marks=pytest.mark.slow),  # minutes of g++, even for two stages
        pytest.param("convnext_zepto_rms", 2, "inductor", marks=pytest.mark.drill),
        pytest.param("seresnet18", None, "eager", marks=pytest.mark.slow),
        pytest.param("convnextv2_atto", None, "eager", marks=pytest.mark.slow),
        pytest.param("test_nfnet", None, "eager", marks=pytest.mark.drill),
        pytest.param("tf_mobilenetv3_small_minimal_100", None, "eager", marks=pytest.mark.drill),
    ],
)
def test_the_packed_model_compiles_into_one_graph_and_once(name, stages, backend):
    torch._dynamo.reset()  # what it learned of other networks' shapes would make it try dynamic ones
    torch.manual_seed(0)
    model = build_spark(name, input_size=64, mask_ratio=0.5, decoder_width=32, stages=stages)
    model.to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 64, 64)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for step in range(3):
        visible = sample_visible(0, step, torch.arange(2), model.grid, model.num_visible)
        loss = compiled(images, visible)
        loss.backward()
        assert loss.item() == pytest.approx(model(images, visible).item(), rel=1e-4)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet10t", "convnext_zepto_rms", "test_efficientnet", "test_nfnet"])
def test_under_autocast_packed_and_masked_agree_to_the_rounding_of_bf16(name):
    torch.manual_seed(0)
    network = timm.create_model(name, features_only=True)
    _randomise_constants(network)
    images = torch.randn(4, 3, 96, 96)
    visible = VisiblePatches(sample_visible(0, 0, torch.arange(4), (3, 3), 4), (3, 3))
    outputs = []
    for kind, enabled in ((PackedEncoder, True), (MaskedEncoder, True), (PackedEncoder, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            features = kind(copy.deepcopy(network), (96, 96)).train()(images, visible)
        outputs.append(features)
    for packed, masked, exact in zip(*outputs, strict=True):
        rounding = (masked.float() - exact).norm() / exact.norm()
        assert (packed.float() - exact).norm() / exact.norm() < 2 * rounding + 1e-3
        assert 0 < rounding < 0.1


@pytest.mark.parametrize("name", ["resnet10t", "tf_mobilenetv3_small_minimal_100", "convnext_zepto_rms"])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_fewer_stages_make_smaller_patches_of_the_same_network(name, stages):
    model = build_spark(name, input_size=(32, 48), mask_ratio=0.5, decoder_width=32, stages=stages)
    assert model.patch == 4 * 2 ** (stages - 1)
    assert len(model.decoder.dec) == model.patch.bit_length() - 1
    assert model(torch.randn(2, 3, 32, 48)).isfinite()


def test_the_printed_encoder_shows_the_plan():
    text = repr(pack(timm.create_model("convnext_atto", features_only=True)))
    assert "groups=40, b=8, algorithm=" in text
    assert "b=1, algorithm=dense" in text


def test_stages_keep_the_first_levels():
    network = timm.create_model("resnet10t", features_only=True, out_indices=(1, 2))
    encoder = MaskedEncoder(network, (64, 64), stages=2)
    assert (encoder.strides, encoder.patch) == ([4, 8], 8)
    with pytest.raises(ValueError, match="the network is in an encoder already: build a new one"):
        MaskedEncoder(network, (64, 64))
    with pytest.raises(ValueError, match="stages must be from 1 to 4"):
        MaskedEncoder(timm.create_model("resnet10t", features_only=True), (64, 64), stages=5)


def test_a_number_stands_for_a_square_input():
    repeated = [repr(pack(timm.create_model("test_resnet", features_only=True), size)) for size in (96, (96, 96))]
    assert repeated[0] == repeated[1]
    with pytest.raises(ValueError, match="input size 70x70 is not a multiple of the patch, 32 px"):
        pack(timm.create_model("test_resnet", features_only=True), 70)


def test_the_patches_of_a_call_are_forgotten_after_it_also_when_it_fails():
    encoder = PackedEncoder(timm.create_model("test_resnet", features_only=True), (64, 64))
    visible = VisiblePatches(torch.tensor([[0, 3], [1, 2]]), (2, 2))
    encoder(torch.randn(2, 3, 64, 64), visible)
    assert encoder.context.visible is None
    with pytest.raises(RuntimeError):
        encoder(torch.randn(2, 4, 64, 64), visible)
    assert encoder.context.visible is None


class Checkpointed(nn.Module):
    def __init__(self, network, reentrant):
        super().__init__()
        self.network, self.reentrant = network, reentrant

    def forward(self, images):
        return checkpoint(lambda x: tuple(self.network(x)), images, use_reentrant=self.reentrant)


@pytest.mark.parametrize("kind", [PackedEncoder, MaskedEncoder])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradient_checkpointing_changes_no_gradient_though_other_patches_were_encoded_since(kind):
    """torch.utils.checkpoint computes layers again in the backward pass, when `forward` is over."""
    by_timm = timm.create_model("test_convnext", features_only=True).double()
    networks = [copy.deepcopy(by_timm), by_timm, *(Checkpointed(copy.deepcopy(by_timm), r) for r in (True, False))]
    by_timm.set_grad_checkpointing(True)
    images = torch.randn(2, 3, 3, 64, 64, dtype=torch.float64)
    visible = [VisiblePatches(sample_visible(s, 0, torch.arange(3), (2, 2), 2), (2, 2)) for s in range(2)]
    gradients = []
    for network in networks:
        encoder = kind(network, (64, 64)).train()
        calls = [encoder(x.clone().requires_grad_(), seen) for x, seen in zip(images, visible, strict=True)]
        assert encoder.context.visible is None
        sum(features.pow(3).mean() for call in calls for features in call).backward()
        assert encoder.context.visible is None
        gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-10, atol=1e-14)
