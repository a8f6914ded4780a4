"""Both checks pass on networks that can be packed, and name the module that mixes positions where it must not."""

import copy

import pytest
import timm
import torch
from torch import nn

from spark_fast import build_spark, verify
from spark_fast.encoder.verify import VerificationError


def test_identity_and_no_leak(network):
    found = verify(network, (64, 96))
    assert found.identity < 1e-6
    assert found.leak == 0


class Cheating(nn.Module):
    """A network that mixes positions in its own code, where no layer shows it."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 2, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x * x.mean((2, 3), keepdim=True)
        return [x, self.down(x)]


def test_a_functional_mix_of_positions_is_caught():
    with pytest.raises(VerificationError, match=r"\(first at the network, a Cheating\): it mixes positions outside"):
        verify(Cheating(), (32, 32))
    small = {"input_size": 32, "mask_ratio": 0.5, "decoder_width": 32}
    with pytest.raises(ValueError, match="mixes positions"):
        build_spark(Cheating(), **small)
    assert build_spark(Cheating(), check=False, **small)


class Careless(nn.Module):
    """Its second level mixes inside a block: the message must name that block."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 4, 4), nn.Sequential(nn.Conv2d(8, 8, 2, 2), Shifted())

    def forward(self, x):
        x = self.stem(x)
        return [x, self.block(x)]


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(x.roll(1, 3))


def test_a_fault_is_named_by_the_module_it_is_in():
    with pytest.raises(VerificationError, match=r"first at block.1, a Shifted"):
        verify(Careless(), (16, 24))


def test_a_number_stands_for_a_square_input():
    small = timm.create_model("test_resnet", features_only=True)
    assert verify(small, 64) == verify(small, (64, 64)) != verify(small, (64, 96))


def test_the_network_itself_is_left_as_it_was():
    network = timm.create_model("test_resnet", features_only=True)
    before, kinds = copy.deepcopy(network.state_dict()), [type(m) for m in network.modules()]
    verify(network, 64)
    assert [type(m) for m in network.modules()] == kinds
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
