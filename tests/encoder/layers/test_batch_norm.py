"""Which batch norms go to the GPU kernels, and with what after them; their values: `batch_norm_cases`."""

import pytest
import timm
import timm.layers as tl
import torch
from torch import nn

from spark_fast import pack
from spark_fast.encoder.context import EncoderContext
from spark_fast.encoder.convert_network import MASKED, PACKED, convert_layers
from spark_fast.encoder.layers import batch_norm
from spark_fast.encoder.layers.batch_norm import Activated, PackedBatchNorm, by_kernels, normalize

pytest.importorskip("triton", reason="triton has no build for this platform")


def converted(*layers, table=PACKED):
    return convert_layers(nn.Sequential(*layers), table, EncoderContext(dense=table is MASKED))[0]


def x(n=4, c=3, dtype=torch.float32):
    return torch.randn(n, c, 2, 2, dtype=dtype)


TAKEN = {
    "BatchNorm2d": nn.BatchNorm2d(3),
    "no running statistics": nn.BatchNorm2d(3, track_running_stats=False),
    "no weight": nn.BatchNorm2d(3, affine=False),
    "BatchNormAct2d": tl.BatchNormAct2d(3),
    "packed": converted(nn.BatchNorm2d(3))[0],
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_norm_in_training_is_taken(name):
    with pytest.raises(RuntimeError, match="the GPU kernels were requested but cannot run"):  # without a GPU
        by_kernels(TAKEN[name], x(), kernels=True)
    assert by_kernels(TAKEN[name], x()) is None


class Own(nn.BatchNorm2d):
    pass


LEFT = {
    "evaluation": (nn.BatchNorm2d(3).eval(), x()),
    "statistics over ranks": (nn.SyncBatchNorm(3), x()),
    "a cumulative average": (nn.BatchNorm2d(3, momentum=None), x()),
    "a class of one's own": (Own(3), x()),
    "a packed one": (converted(tl.FrozenBatchNormAct2d(3))[0], x()),
    "another norm": (tl.LayerNorm2d(3), x()),
    "no patch": (nn.BatchNorm2d(3), x(0)),
    "one value": (nn.BatchNorm2d(3), x()[:1, :, :1, :1]),
    "rows": (nn.BatchNorm2d(3), x()[:, :, 0, 0]),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_the_kernels_do_not_compute_is_left_to_pytorch(name):
    norm, cells = LEFT[name]
    assert by_kernels(norm, cells, kernels=True) is None


def test_a_sum_that_would_broadcast_or_convert_is_left_to_pytorch():
    for residual in (x(1), x(dtype=torch.float64)):
        assert by_kernels(nn.BatchNorm2d(3), x(), "relu", residual, True) is None


def test_small_maps_are_left_to_pytorch_unless_the_kernels_are_forced(monkeypatch):
    monkeypatch.setattr(batch_norm, "LEAST_ELEMENTS", 49)  # more than 4*3*2*2
    monkeypatch.setattr(batch_norm.gpu, "use_kernels", lambda wanted, like: pytest.fail("must not be asked"))
    assert by_kernels(nn.BatchNorm2d(3), x()) is None
    with pytest.raises(pytest.fail.Exception):
        by_kernels(nn.BatchNorm2d(3), x(), kernels=True)
    with pytest.raises(pytest.fail.Exception):
        by_kernels(nn.BatchNorm2d(3), x(5))


def test_by_pytorch_it_is_layer_by_layer():
    norm, cells, residual = nn.BatchNorm2d(3), x(), x()
    expected = nn.functional.silu(nn.BatchNorm2d(3)(cells) + residual)
    assert torch.equal(normalize(norm, nn.SiLU(), cells, residual), expected)
    assert torch.equal(normalize(norm, None, cells), nn.BatchNorm2d(3)(cells))


def followed(network):
    return [m.followed_by for m in network.modules() if isinstance(m, PackedBatchNorm)]


def test_a_norm_takes_over_the_activation_that_its_container_runs_next():
    assert followed(converted(nn.BatchNorm2d(3), nn.ReLU())) == ["relu"]
    assert followed(converted(nn.BatchNorm2d(3), nn.ReLU6(), nn.ReLU())) == ["relu6"]
    assert followed(converted(nn.BatchNorm2d(3), nn.SiLU())) == [""]
    assert followed(converted(nn.BatchNorm2d(3), nn.Identity(), nn.ReLU())) == [""]
    twice = nn.BatchNorm2d(3)
    assert followed(converted(twice, nn.ReLU(), twice, nn.SiLU())) == [""]
    assert not followed(converted(nn.BatchNorm2d(3), nn.ReLU(), table=MASKED))


class Unordered(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        return self.norm(x) + self.act(x)


def test_the_order_of_children_says_nothing_of_a_forward_of_ones_own():
    assert followed(converted(Unordered())) == [""]


def test_the_stem_of_timms_networks_is_taken_together_unless_the_norm_is_shown():
    network = timm.create_model("resnet10t", features_only=True)
    encoder = pack(network, 64)
    assert isinstance(encoder.network["act1"], Activated)
    assert encoder.network["bn1"].followed_by == "relu"
    shown = timm.create_model("resnet10t", features_only=True)
    shown.return_layers["bn1"] = "9"
    assert convert_layers(shown, PACKED, EncoderContext(dense=False))[0]["bn1"].followed_by == ""


def test_an_activation_runs_unless_the_norm_before_it_has_computed_it():
    network = converted(nn.BatchNorm2d(3), nn.ReLU())
    cells = x()
    assert torch.equal(network[1](cells), cells.relu())
    network[1].context.activated = cells
    assert network[1](cells) is cells
    assert network[1].context.activated is None
    network[1].context.activated = x()
    assert torch.equal(network[1](cells), cells.relu()), "another tensor"
