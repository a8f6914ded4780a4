"""Networks that timm and torchvision share have the same tensors under other names."""

import pytest
import timm
import torch

from spark_fast.weights.torchvision_keys import shared_networks, torchvision_names


@pytest.mark.slow
@pytest.mark.parametrize("name", shared_networks())
def test_every_tensor_of_a_network_that_torchvision_has_too_has_its_name_there(name):
    import torchvision

    with torch.device("meta"):
        ours = timm.create_model(name).state_dict()
        theirs = torchvision.models.get_model(name).state_dict()
    names = torchvision_names(name, list(ours))
    assert set(names.values()) == set(theirs)
    assert all(theirs[names[k]].numel() == v.numel() for k, v in ours.items())


def test_a_network_that_torchvision_lacks_is_refused_with_those_it_has():
    with pytest.raises(ValueError, match=r"torchvision has no resnet10t; it shares these .*convnext_base"):
        torchvision_names("resnet10t", [])
