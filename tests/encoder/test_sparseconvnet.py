"""The sparseconvnet encoder equals the packed one; what it cannot do stays packed; where it is missing it says so."""

import copy
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from spark_fast import build_spark
from spark_fast.encoder import PackedEncoder, VisiblePatches
from spark_fast.encoder.sparseconvnet import (
    INSTALL,
    SparseConv,
    SparseConvNetError,
    SparseEncoder,
    require,
    submanifold,
)
from spark_fast.encoder.verify import _randomise_constants
from spark_fast.masking import sample_visible

# plain and bottleneck blocks with stems of 3x3 layers, and a network with no layer that SparseConvNet can do
NETWORKS = ["resnet10t", "resnet26d", "convnext_atto"]
GRIDS = [(32, (3, 4), 0.6), (32, (4, 3), 0.25), (16, (4, 5), 0.6), (16, (5, 4), 0.25)]  # patch, patches, masked


@pytest.fixture
def scn():
    return pytest.importorskip("sparseconvnet", reason="not installed: see spark_fast/encoder/sparseconvnet.py")


def network(name, patch=32, **kwargs):
    torch.manual_seed(0)
    levels = {32: 4, 16: 3}[patch]
    first = 0 if name.startswith("convnext") else 1
    made = timm.create_model(name, features_only=True, out_indices=range(first, first + levels), **kwargs)
    _randomise_constants(made)
    return made


def smooth_network(name, patch):
    """Without a ReLU or a maximum: in float32 one that flips changes a gradient by 1e-2, in any two encoders."""
    made = network(name, patch, act_layer="silu")
    if hasattr(made, "maxpool"):
        made.maxpool = nn.AvgPool2d(3, 2, 1)
    return made


def masked(batch, grid, ratio, step=0):
    keep = round(grid[0] * grid[1] * (1 - ratio))
    return VisiblePatches(sample_visible(0, step, torch.arange(batch), grid, keep), grid)


def features_and_gradients(encoder, images, visible):
    x = images.clone().requires_grad_()
    features = encoder.train()(x, visible)
    generator = torch.Generator().manual_seed(0)
    sum((f * torch.randn(f.shape, generator=generator)).sum() for f in features).backward()
    gradients = {name: p.grad for name, p in encoder.network.named_parameters() if p.grad is not None}
    return {**{f"level {i}": f.detach() for i, f in enumerate(features)}, "images": x.grad, **gradients}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(("patch", "grid", "ratio"), GRIDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_it_equals_the_packed_encoder_in_features_and_all_gradients(scn, name, patch, grid, ratio):
    size = (patch * grid[0], patch * grid[1])
    images = torch.randn(4, 3, *size, generator=torch.Generator().manual_seed(1))
    made = smooth_network(name, patch)
    got, expected = (
        features_and_gradients(kind(copy.deepcopy(made), size), images, masked(4, grid, ratio))
        for kind in (SparseEncoder, PackedEncoder)
    )
    assert list(got) == list(expected)
    levels = [k for k in got if k.startswith("level")]
    assert max(relative(got[k], expected[k]) for k in levels) < 1e-5
    # a norm's bias has a gradient of thousands of terms that cancel: one tensor alone is off by 1.7e-5 from float64
    # in the packed encoder too
    gradients = [k for k in got if k not in levels]
    assert relative(*(torch.cat([run[k].flatten() for k in gradients]) for run in (got, expected))) < 1e-5
    assert max(relative(got[k], expected[k]) for k in gradients) < 1e-4


@pytest.mark.parametrize("k", [3, 5, 7])
@pytest.mark.parametrize("b", [1, 2, 4])
def test_a_layer_is_the_masked_dense_convolution(scn, k, b):
    visible = masked(2, (3, 4), 0.5)
    x = (
        torch.randn(visible.count, 5, b, b).relu().requires_grad_()
    )  # a visible cell that is zero is active all the same
    conv = nn.Conv2d(5, 6, k, padding=k // 2)
    outputs = {
        "sparse": submanifold(x, conv.weight, conv.bias, visible),
        "dense": visible.pack(F.conv2d(visible.unpack(x), conv.weight, conv.bias, padding=k // 2)),
    }
    grad = torch.randn(visible.count, 6, b, b)
    found = {name: [out, *torch.autograd.grad(out, (x, conv.weight, conv.bias), grad)] for name, out in outputs.items()}
    torch.testing.assert_close(found["sparse"], found["dense"], rtol=1e-4, atol=1e-5)


def test_which_layers_it_computes():
    def able(*args, **kwargs):
        conv = type("Layer", (SparseConv, nn.Conv2d), {})(3, 6, *args, **kwargs)
        return conv.can_be_submanifold(8)

    assert able(3, padding=1)
    assert able(7, padding=3)
    assert not able(1)
    assert not able(3)
    assert not able(4, padding=1)
    assert not able(3, stride=2, padding=1)
    assert not able(2, stride=2)
    assert not able(3, padding=2, dilation=2)
    assert not able(3, padding=1, groups=3)


def test_cells_and_rulebooks_are_made_once_a_step_and_resolution(scn, monkeypatch):
    made = []
    monkeypatch.setattr(scn, "Metadata", lambda dim, make=scn.Metadata: made.append(dim) or make(dim))
    encoder = SparseEncoder(network("resnet10t"), (96, 96))
    resolutions = 5  # 16 cells in the stem, then 8, 4, 2, 1
    for step in (1, 2):
        features = encoder(torch.randn(2, 3, 96, 96), masked(2, (3, 3), 0.5, step))
        sum(f.sum() for f in features).backward()
        assert len(made) == step * resolutions


def test_parameters_and_their_names_are_the_networks(scn):
    made = network("resnet10t")
    before = copy.deepcopy(made).state_dict()
    encoder = SparseEncoder(made, (64, 64))
    after = encoder.network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert list(copy.deepcopy(encoder).state_dict()) == list(encoder.state_dict())


def test_a_training_step_gives_the_packed_loss_and_gradients(scn):
    losses, gradients = [], []
    for encoder in ("sparseconvnet", "packed"):
        torch.manual_seed(0)
        spark = build_spark("resnet10t", input_size=96, mask_ratio=0.5, decoder_width=32, encoder=encoder)
        images = torch.randn(4, 3, 96, 96)
        visible = sample_visible(0, 0, torch.arange(4), spark.grid, spark.num_visible)
        loss = spark.train()(images, visible)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in spark.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert relative(*gradients) < 2e-2  # 3e-6 unless a ReLU flips, see `smooth_network`


def test_autocast_is_left_outside(scn):
    visible = masked(2, (3, 3), 0.5)
    x, conv = torch.randn(visible.count, 5, 4, 4), nn.Conv2d(5, 6, 3, padding=1)
    exact = submanifold(x, conv.weight, conv.bias, visible)
    with torch.autocast("cpu", torch.bfloat16):
        out = submanifold(x, conv.weight, conv.bias, visible)
        out.sum().backward()  # some do it inside
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.bfloat16())
    assert conv.weight.grad.dtype == torch.float32


def test_float64_is_computed_as_in_the_packed_encoder(scn):
    made = network("resnet10t").double()
    images, visible = torch.randn(2, 3, 64, 64, dtype=torch.float64), masked(2, (2, 2), 0.5)
    a, b = (kind(copy.deepcopy(made), (64, 64))(images, visible) for kind in (SparseEncoder, PackedEncoder))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_called_without_a_mask_it_is_the_dense_network(scn):
    made = network("resnet10t").eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(SparseEncoder(copy.deepcopy(made), (64, 64)).eval()(images), made(images))


def test_it_runs_under_compile_with_graph_breaks(scn):
    encoder = SparseEncoder(network("resnet10t"), (64, 64)).eval()
    images, visible = torch.randn(2, 3, 64, 64), masked(2, (2, 2), 0.5)
    torch.testing.assert_close(torch.compile(encoder, backend="eager")(images, visible), encoder(images, visible))


def test_where_it_is_missing_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sparseconvnet", None)
    with pytest.raises(SparseConvNetError) as caught:
        require()
    assert INSTALL in str(caught.value)
    assert "--encoder packed" in str(caught.value)
    with pytest.raises(ValueError, match=r"git clone .*SparseConvNet"):
        build_spark("resnet10t", input_size=64, mask_ratio=0.5, decoder_width=32, encoder="sparseconvnet")
