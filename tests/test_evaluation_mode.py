"""Evaluation mode for a while."""

import pytest
from torch import nn

from spark_fast.evaluation_mode import evaluation_mode


def test_every_module_has_its_own_mode_again_after_an_error_too():
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Sequential(nn.Dropout()))
    network[1].eval()
    modes = [True, True, False, False]
    with evaluation_mode(network):
        assert not any(m.training for m in network.modules())
    assert [m.training for m in network.modules()] == modes
    with pytest.raises(KeyError), evaluation_mode(network):
        raise KeyError
    assert [m.training for m in network.modules()] == modes
