"""A file that does not say of which network it is, is told by its tensors."""

import pytest
import timm
import torch

from spark_fast.weights.pretrained import RECOGNISED, recognise
from spark_fast.weights.torchvision_keys import shared_networks, torchvision_names


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


@pytest.mark.parametrize("name", shared_networks())
def test_every_tensor_of_a_network_that_torchvision_has_too_has_its_name_there(name):
    import torchvision

    with torch.device("meta"):
        ours = timm.create_model(name).state_dict()
        theirs = torchvision.models.get_model(name).state_dict()
    names = torchvision_names(name, list(ours))
    assert set(names.values()) == set(theirs)
    assert all(theirs[names[k]].numel() == v.numel() for k, v in ours.items())
