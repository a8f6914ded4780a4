"""A file that does not say of which network it is, is told by its tensors."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from spark_fast.weights.identify import RECOGNISED, image_channels, named_network, recognise, recognise_beneath
from spark_fast.weights.named_tensors import flatten, read_state


@pytest.mark.parametrize("name", RECOGNISED)
def test_a_network_is_recognised_by_its_shapes_with_classifier_or_without(name):
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    assert recognise(state) == name
    assert recognise({k: v for k, v in state.items() if not k.startswith(("fc.", "head."))}) == name


def test_another_network_or_part_of_one_is_not_recognised():
    with torch.device("meta"):
        state = timm.create_model("resnet50").state_dict()
        assert recognise(timm.create_model("resnet26").state_dict()) == ""
    del state["layer4.2.conv3.weight"]
    assert recognise(state) == ""


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"settings": {"model": {"model": "res50"}}}, "resnet50"),
        ({"settings": {"model": {"model": "package.module:function"}}}, "package.module:function"),
        ({"settings": {"data": {}}, "arch": "resnet18"}, "resnet18"),
        ({"arch": "cnxL"}, "convnext_large"),
        ({"arch": "package.module:function"}, "package.module:function"),
        ({"arch": "a network of another program"}, ""),
        ({"arch": 3}, ""),
        ({}, ""),
    ],
    ids=lambda v: str(v),
)
def test_a_checkpoint_names_its_network(tmp_path, content, expected):
    assert named_network(tmp_path / "a.pth", content, content.get("settings", {})) == expected


@pytest.mark.parametrize("name", ["resnet18", "a network of another program"])
def test_safetensors_name_theirs_in_the_metadata(tmp_path, name):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {"architecture": name})
    assert named_network(tmp_path / "a.safetensors", {}, {}) == (name if name == "resnet18" else "")


@pytest.mark.parametrize("channels", [1, 3, 12])
def test_a_network_is_recognised_and_its_channels_told_by_its_tensors(channels):
    with torch.device("meta"):
        state = timm.create_model("resnet18", in_chans=channels).state_dict()
    assert recognise(state) == "resnet18"
    assert image_channels("resnet18", read_state(state), {}) == channels
    assert image_channels("mine:build", read_state(state), {}) == 3
    beneath = flatten({"a": {"model": state}, "b": {"other": torch.zeros(1)}})
    assert recognise_beneath(beneath) == "resnet18"
    assert image_channels("resnet18", read_state({"x": torch.zeros(1)}), beneath) == channels
