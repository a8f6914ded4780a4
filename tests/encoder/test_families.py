"""One small member of every family of timm's ConvNets: identity, no leak, packed equals masked."""

import copy

import pytest
import timm
import torch

from spark_fast import verify
from spark_fast.encoder import MaskedEncoder, PackedEncoder, VisiblePatches
from spark_fast.encoder.grouped_float64 import FastGroups
from spark_fast.encoder.verified_networks import sweep_results
from spark_fast.encoder.verify import _randomise_constants
from spark_fast.masking import sample_visible
from spark_fast.networks import build_network

pytestmark = pytest.mark.usefixtures("one_thread")

# the smallest member of every family (module of timm), and of every kind of layer that it lacks
FAMILIES = [
    "test_byobnet", "test_convnext", "cs3darknet_focus_s", "cspnext_tiny", "densenet121", "dla46x_c", "dpn48b",
    "test_efficientnet", "fasternet_t0", "fastvit_t8", "focalnet_tiny_srf", "ghostnet_050", "hardcorenas_b",
    "hgnetv2_b0", "hrnet_w18_small", "inception_next_atto", "lcnetv2_small", "test_mambaout", "poolformerv2_s12",
    "lcnet_035", "test_nfnet", "rdnet_tiny", "regnetx_002", "repghostnet_050", "repvit_m1", "res2next50",
    "resnest14d", "test_resnet", "resnetv2_18", "rexnet_100", "selecsls42", "legacy_seresnet18", "lowformer_e1",
    "skresnet18", "starnet_s050", "tresnet_m", "vgg11", "ese_vovnet19b_slim_dw", "xception41p", "resnetv2_50x1_bit",
    "efficientnet_cc_b0_4e", "gcresnet33ts", "eca_resnet33ts", "mixnet_s", "hgnet_tiny", "test_efficientnet_gn",
    "test_efficientnet_ln", "test_efficientnet_evos", "tf_mobilenetv3_small_minimal_100",
    "mobilenetv4_conv_small_035", "ghostnetv2_100", "convformer_s18",
]  # fmt: skip
LOOSE = {"test_efficientnet_evos"}  # its norm computes in fp32 whatever it is given


# one of each way to go wrong: plain, depthwise, split attention, dense blocks, blur pooling, odd norms, padded stem
FAST = {"test_byobnet", "test_convnext", "test_efficientnet", "test_nfnet", "resnest14d", "test_resnet", "hgnetv2_b0",
        "test_efficientnet_gn", "test_efficientnet_evos"}  # fmt: skip
# CI takes every third one of the rest
REST = [name for name in FAMILIES if name not in FAST]
MARKS = {name: [pytest.mark.slow, pytest.mark.drill][i % 3 > 0] for i, name in enumerate(REST)}
PARAMS = [name if name in FAST else pytest.param(name, marks=MARKS[name]) for name in FAMILIES]


@pytest.fixture(scope="module", params=PARAMS)
def named(request):
    if not timm.is_model(request.param):
        pytest.skip(f"timm {timm.__version__} has no {request.param}")
    torch.manual_seed(0)
    return request.param, build_network(request.param)


def test_identity_and_no_leak(named):
    name, network = named
    found = verify(network)
    assert found.identity < (1e-4 if name in LOOSE else 1e-5)
    assert found.leak == 0


def test_packed_equals_masked(named):
    name, network = named
    network = copy.deepcopy(network).double()
    _randomise_constants(network)
    grid = (2, 3)
    visible = VisiblePatches(sample_visible(1, 0, torch.arange(2), grid, 3), grid)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shared = {id(p): p for p in network.parameters()}
    runs = []
    for kind in (PackedEncoder, MaskedEncoder):
        encoder = kind(copy.deepcopy(network, dict(shared)), (64, 96)).train()
        torch.manual_seed(1)  # the same stochastic depth
        with FastGroups():
            features = encoder(images, visible)
            weights = [torch.randn(f.shape, generator=torch.Generator().manual_seed(2)) for f in features]
            loss = torch.stack([(f * w).sum() for f, w in zip(features, weights, strict=True)]).sum()
            used = [p for p in encoder.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(loss, used, allow_unused=True)
        runs.append((features, gradients))
    tolerance = 1e-4 if name in LOOSE else 1e-7
    (features, gradients), (expected, references) = runs
    for a, b in zip(features, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()
    scale = max(g.norm() for g in references if g is not None)
    for a, b in zip(gradients, references, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= tolerance * (b.norm() + 1e-5 * scale)


def test_every_verified_family_is_tested():
    swept = sweep_results()["verified"]
    if not swept:
        pytest.skip(f"timm {timm.__version__} was not swept")
    family = timm.models._registry._model_to_module
    assert {family[n] for n in swept} <= {family[n] for n in FAMILIES}
    assert set(FAMILIES) <= set(swept)
