"""Networks by name: timm's, by stages, and your own."""

import sys

import pytest
import torch

from spark_fast.errors import SettingsError
from spark_fast.networks import build_network, count_levels, import_from_current_folder, takes_drop_path


def test_stages_of_an_efficientnet_leave_the_later_blocks_out():
    whole, part = build_network("test_efficientnet"), build_network("test_efficientnet", stages=2)
    assert len(part.blocks) < len(whole.blocks)
    maps = part.eval()(torch.randn(1, 3, 64, 64))
    assert [m.shape[2] for m in maps] == [16, 8]


def test_levels_are_counted_where_a_network_of_timm_has_some():
    names = ("resnet10t", "test_efficientnet", "mlp_mixer", "mine:build")
    assert [count_levels(name) for name in names] == [4, 4, 0, 0]


@pytest.mark.parametrize("stages", [None, 2])
def test_a_network_of_timm_is_built_for_the_channels_of_the_images(stages):
    network = build_network("test_efficientnet", stages=stages, in_chans=5)
    assert network.conv_stem.in_channels == 5
    assert build_network("test_efficientnet", stages=stages).conv_stem.in_channels == 3


@pytest.mark.parametrize(
    ("name", "stages", "message"),
    [
        ("resnet51", None, "unknown model 'resnet51'; did you mean resnet51q, resnet50"),
        ("resnet10t", 5, "stages must be from 1 to 4, the levels of resnet10t, got 5"),
        ("nowhere:build", None, "model 'nowhere:build' cannot be imported: No module named 'nowhere'"),
        ("json:build", None, "cannot be imported: module 'json' has no attribute 'build'"),
        ("json:dumps", None, "dumps\\(\\) missing 1 required"),
        ("builtins:dict", None, "returned a dict, not an nn.Module"),
        (":build", None, "cannot be imported"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused_with_the_reason(name, stages, message):
    with pytest.raises(ValueError, match=message):
        build_network(name, stages=stages)


def test_your_own_network_is_found_in_the_current_folder_where_a_command_looks_there(tmp_path, monkeypatch):
    (tmp_path / "mine_for_the_test.py").write_text(
        "from torch import nn\n\ndef build(width=3):\n    return nn.Conv2d(3, width, 1)\n"
    )
    monkeypatch.chdir(tmp_path)
    path = [entry for entry in sys.path if entry]  # "" is the current folder
    monkeypatch.setattr(sys, "path", list(path))
    with pytest.raises(ValueError, match="No module named 'mine_for_the_test'"):
        build_network("mine_for_the_test:build")
    import_from_current_folder("resnet50")
    assert sys.path == path
    for _ in range(2):
        import_from_current_folder("mine_for_the_test:build")
    assert sys.path == [str(tmp_path), *path]
    assert build_network("mine_for_the_test:build", {"width": 5}).out_channels == 5


def test_your_own_network_gets_a_drop_path_rate_where_its_function_takes_one(tmp_path, monkeypatch):
    (tmp_path / "own_rates.py").write_text(
        "from torch import nn\n\ndef plain(width=3):\n    return nn.Identity()\n\n"
        "def rated(drop_path_rate=0.0):\n    return nn.Dropout(drop_path_rate)\n\n"
        "def any(**kwargs):\n    return rated(**kwargs)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    names = ("resnet50", "own_rates:plain", "own_rates:rated", "own_rates:any", "builtins:dict")
    assert [takes_drop_path(name) for name in names] == [True, False, True, True, True]
    assert build_network("own_rates:any", {"drop_path_rate": 0.25}).p == 0.25
    with pytest.raises(ValueError, match=r"'own_rates:plain' takes no drop_path_rate: give --drop_path 0, or"):
        build_network("own_rates:plain", {"drop_path_rate": 0.25})
    with pytest.raises(SettingsError, match="cannot be imported"):
        takes_drop_path("own_rates:missing")
