"""Layer-wise rates against the published counting of layers."""

import pytest
import timm
import torch

from spark_fast.evaluation.layer_decay import parameter_groups


@pytest.mark.parametrize(
    ("name", "exponents"),  # by models/__init__.py of the published code
    [
        ("resnet50", {"conv1.weight": 7, "layer1.2.conv1.weight": 6, "layer2.1.conv1.weight": 5, "fc.weight": 0,
                      "layer2.2.conv1.weight": 4, "layer3.2.conv1.weight": 3, "layer3.5.conv1.weight": 2,
                      "layer4.0.conv1.weight": 1}),
        ("resnet101", {"bn1.weight": 13, "layer3.22.conv2.weight": 2, "layer4.2.conv3.weight": 1, "fc.bias": 0}),
        ("convnext_small", {"stem.0.weight": 13, "stages.0.blocks.2.conv_dw.weight": 12,
                            "stages.3.downsample.0.bias": 1,
                            "stages.1.downsample.1.weight": 11, "stages.2.downsample.1.weight": 10,
                            "stages.2.blocks.0.gamma": 10, "stages.2.blocks.26.mlp.fc1.weight": 2,
                            "stages.3.blocks.0.gamma": 1, "head.norm.weight": 0, "head.fc.weight": 0}),
        ("convnext_atto", {"stem.0.weight": 7, "stages.2.blocks.5.gamma": 3, "stages.3.blocks.1.gamma": 1}),
    ],
)  # fmt: skip
def test_layers_are_counted_as_published(name, exponents):
    with torch.device("meta"):
        model = timm.create_model(name)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, 0.5)
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert set(found) == set(names.values())
    for parameter, exponent in exponents.items():
        assert found[parameter]["lr_scale"] == pytest.approx(0.5**exponent), parameter
    assert all(group["decays"] == (p.dim() > 1) for group in groups for p in group["params"])


def test_other_networks_are_counted_as_timm_does_and_without_decay_all_rates_are_one():
    with torch.device("meta"):
        model = timm.create_model("efficientnet_b0")
    scales = {group["lr_scale"] for group in parameter_groups(model, 0.5)}
    assert len(scales) > 5
    assert {group["lr_scale"] for group in parameter_groups(model, 1.0)} == {1.0}
