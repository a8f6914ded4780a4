"""Backbones for detectors: torchvision's Mask R-CNN loads them; names for the others, as those programs build them."""

import re

import pytest
import torch
from torchvision.models.detection import maskrcnn_resnet50_fpn

from spark_fast import build_spark
from spark_fast.weights.spark_keys import spark_state_dict
from tools import detection_weights

NORM = ("weight", "bias", "running_mean", "running_var")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """source(network): a checkpoint with the published names, and its model."""
    folder = tmp_path_factory.mktemp("published")

    def write(network):
        model = build_spark(network, input_size=64, mask_ratio=0.5, decoder_width=32)
        for buffer in (b for name, b in model.named_buffers() if "running" in name):
            buffer.uniform_(0.5, 1.5)
        torch.save(spark_state_dict(model), path := folder / f"{network}.pth")
        return path, model

    return write


@pytest.fixture(scope="module")
def resnet50(source):
    return source("resnet50")


def written(path, to, folder, network):
    out = folder / f"{to}.pth"
    words = [str(path), "--to", to, "--out", str(out), "--model", network]
    assert detection_weights.main(words) == 0
    return torch.load(out, weights_only=True)


def test_mask_r_cnn_of_torchvision_takes_every_tensor(resnet50, tmp_path):
    state = written(resnet50[0], "torchvision", tmp_path, "resnet50")
    detector = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    missing, unexpected = detector.backbone.body.load_state_dict(state, strict=False)
    assert unexpected == []
    assert [detection_weights.mmdetection_name(name) for name in state] == list(state), "a ResNet's names are the same"
    assert all(name.endswith("num_batches_tracked") for name in missing)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found = detector.eval().backbone.body(images)["3"]
        features = resnet50[1].eval().encoder(images)[-1]
    torch.testing.assert_close(found, features)


def test_names_are_those_of_detectron2(resnet50, tmp_path):
    """modeling/backbone/resnet.py: a stem, res2 to res5 of bottleneck blocks, a norm in each convolution."""
    convolutions = ["stem.conv1"]
    for stage, blocks in zip(range(2, 6), (3, 4, 6, 3), strict=True):
        for block in range(blocks):
            inner = ["conv1", "conv2", "conv3", *(["shortcut"] if block == 0 else [])]
            convolutions += [f"res{stage}.{block}.{name}" for name in inner]
    names = {f"{c}.{rest}" for c in convolutions for rest in ("weight", *(f"norm.{n}" for n in NORM))}
    state = written(resnet50[0], "detectron2", tmp_path, "resnet50")["model"]
    assert set(state) == {f"backbone.bottom_up.{name}" for name in names}
    assert state["backbone.bottom_up.res3.0.shortcut.weight"].shape == (512, 256, 1, 1)


def test_names_of_a_convnext_are_those_of_mmdetection(source, tmp_path, capsys):
    """mmpretrain/models/backbones/convnext.py; its norms of the four outputs begin anew. The others have none."""
    names = {f"downsample_layers.{i}.{j}.{n}" for i in range(4) for j in (0, 1) for n in ("weight", "bias")}
    for stage, blocks in enumerate((3, 3, 9, 3)):
        for block in range(blocks):
            inner = ("depthwise_conv", "norm", "pointwise_conv1", "pointwise_conv2")
            names |= {f"stages.{stage}.{block}.{part}.{n}" for part in inner for n in ("weight", "bias")}
            names.add(f"stages.{stage}.{block}.gamma")
    path = source("convnext_tiny")[0]
    assert set(written(path, "mmdetection", tmp_path, "convnext_tiny")) == names
    out = tmp_path / "a.pth"
    assert detection_weights.main([str(path), "--to=detectron2", f"--out={out}", "--model=convnext_tiny"]) == 2
    assert "no backbone convnext_tiny for detectron2" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("network", "more", "message"),
    [
        ("resnet10t", {}, "no backbone resnet10t for torchvision, which gets resnet18, resnet34"),
        ("resnet18", {"stages": 3}, "only the first 3 stages of resnet18 were pre-trained"),
        ("resnet18", {"in_chans": 1}, "detectors take images of 3 channels, .* has 1"),
    ],
)
def test_a_backbone_that_a_detector_would_not_load_or_in_part_is_refused(tmp_path, capsys, network, more, message):
    model = build_spark(network, input_size=64, mask_ratio=0.5, decoder_width=32, **more)
    torch.save(spark_state_dict(model), tmp_path / "a.pth")
    out = tmp_path / "out.pth"
    words = [str(tmp_path / "a.pth"), "--to", "torchvision", "--out", str(out), "--model", network]
    assert detection_weights.main(words) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not out.exists()


@pytest.mark.parametrize("out", ["a.pkl", "there.pth"])
def test_a_file_that_cannot_be_written_is_refused(out, resnet50, tmp_path, capsys):
    (tmp_path / "there.pth").write_bytes(b"mine")
    assert detection_weights.main([str(resnet50[0]), "--to", "detectron2", "--out", str(tmp_path / out)]) == 2
    assert "must end with .pth and must not exist yet" in capsys.readouterr().err
    assert (tmp_path / "there.pth").read_bytes() == b"mine"
