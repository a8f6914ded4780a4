"""The small networks on which both encoders and `verify` are tested."""

import pytest
import timm
import torch
from torch import nn

from spark_fast.encoder.verify import _randomise_constants

# one small member of each kind: BasicBlock, Bottleneck, pooled shortcut, blur, SE, GroupNorm, pre-activation,
# ConvNeXt, GRN, convolutional MLP, overlapping stem
NETWORKS = [
    ("resnet10t", {}),
    ("resnet14t", {}),
    ("resnetblur18", {}),
    ("seresnet18", {}),
    ("resnetv2_18", {}),
    ("resnet26", {"norm_layer": "groupnorm"}),
    ("convnext_zepto_rms", {}),
    ("convnextv2_atto", {}),
    ("convnext_atto_ols", {}),
]


FAST = {"resnet14t", "seresnet18", "convnext_zepto_rms", "convnextv2_atto"}
PARAMS = [
    pytest.param((name, kwargs), id=name, marks=[] if name in FAST else [pytest.mark.slow]) for name, kwargs in NETWORKS
]


@pytest.fixture(scope="module", params=PARAMS)
def network(request):
    name, kwargs = request.param
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True, **kwargs).double()
    _randomise_constants(model)
    for layer in model.modules():
        # Of two cells per channel, normalised to +-1 whatever they are, the gradient is a remainder of eps: with 1e-5,
        # rounding alone, of either encoder, comes to 1e-10 of it, more or less by processor and threads.
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-3
    return model
