"""What every method has; a method of one's own, and one beside SparK, in the trainer."""

import re
from pathlib import Path

import pytest
import timm
import torch

from spark_fast import build_fcmae, build_spark, pretrain
from spark_fast.checkpoint.file import read
from spark_fast.errors import CheckpointError, SettingsError
from spark_fast.fcmae import FCMAE
from spark_fast.method import METHODS, Method, method_class
from spark_fast.spark import SparK
from spark_fast.weights.load_pretrained import load_pretrained
from tests.pipelines.pictures import jpeg

PAGE = Path(__file__).parents[1] / "docs" / "explanation" / "methods.md"
SETTINGS = {"model": "resnet10t", "input_size": 64, "batch_size": 4, "epochs": 2, "device": "cpu", "workers": 1}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.jpg").write_bytes(jpeg(i, 60 + i, 70))
    return folder


def test_every_method_is_found_by_its_name():
    assert [method_class(name) for name in METHODS] == [SparK, FCMAE]


@pytest.mark.slow
def test_a_method_of_your_own_is_trained_and_never_imported_from_a_file(images, tmp_path, monkeypatch):
    """The class that docs/explanation/methods.md shows."""
    shown = re.search(r"```python\n(.*?)model = build", PAGE.read_text(), re.DOTALL)[1]
    (tmp_path / "my_method.py").write_text(shown)
    monkeypatch.syspath_prepend(tmp_path)
    settings = {**SETTINGS, "method": "my_method:OneLayer", "exp_dir": tmp_path / "run"}
    assert not pretrain(images, **settings, max_steps=1).finished
    assert pretrain(images, **settings, resume="auto").finished
    assert list((tmp_path / "run" / "reconstruction").iterdir())
    with pytest.raises(CheckpointError, match="your own method, my_method:OneLayer"):
        load_pretrained(tmp_path / "run")


@pytest.mark.slow
def test_resumed_with_fcmae_and_two_masks_an_image_it_ends_with_the_same_bits(images, tmp_path):
    settings = {**SETTINGS, "method": "fcmae", "decoder_width": 16, "mask_ratio": 0.5, "masks_per_image": 2}
    pretrain(images, **settings, exp_dir=tmp_path / "whole")
    for _ in range(4):
        pretrain(images, **settings, exp_dir=tmp_path / "parts", resume="auto", max_steps=1)
    whole, parts = (read(tmp_path / name / "ckpt-last.pth") for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 4
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name
    again = load_pretrained(tmp_path / "whole")
    assert isinstance(again.model, FCMAE)
    assert again.spec.decoder_width == 16


def test_more_masks_than_there_are_patches_for_are_refused_with_the_most(images, tmp_path):
    with pytest.raises(SettingsError, match=r"3 masks that each show 2 of the 4 patches .* at most 2"):
        pretrain(images, **SETTINGS, mask_ratio=0.5, masks_per_image=3, exp_dir=tmp_path / "run")


@pytest.mark.parametrize("channels", [1, 4, 12])
@pytest.mark.parametrize(("build", "name"), [(build_spark, "test_resnet"), (build_fcmae, "test_convnext2")])
def test_packed_equals_masked_for_images_of_any_number_of_channels(build, name, channels):
    found = []
    images = torch.randn(2, channels, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for encoder in ("packed", "masked"):
        torch.manual_seed(0)
        model = build(
            name, input_size=(64, 96), decoder_width=32, encoder=encoder, in_chans=channels, check=False
        ).double()
        loss = model(images, mask := model.sample_masks(0, 0, torch.arange(2)))
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in model.parameters())])
        filled = model.eval().reconstruct(images, mask)
        assert filled.shape == images.shape
        assert ((filled != images).sum((0, 2, 3)) == 2 * 32 * 32 * (6 - mask.shape[1])).all(), "in every channel"
    for packed, masked in zip(*found, strict=True):
        torch.testing.assert_close(packed, masked, rtol=1e-7, atol=1e-11)


def test_every_channel_is_predicted():
    """The loss is the mean over all channels: a change in any one of them, where masked, changes it."""
    torch.manual_seed(0)
    model = build_spark("test_resnet", input_size=64, decoder_width=32, in_chans=5, check=False).double()
    images = torch.randn(1, 5, 64, 64, dtype=torch.float64, requires_grad=True)
    visible = torch.tensor([[[True, True], [True, False]]])
    model(images, visible).backward()
    assert (images.grad[:, :, 32:, 32:] != 0).flatten(2).all(2).all()


def test_images_of_another_number_of_channels_are_refused():
    model = build_spark("test_resnet", input_size=64, in_chans=4, check=False)
    with pytest.raises(ValueError, match=r"images must be \(B, 4, 64, 64\), got \(2, 3, 64, 64\)"):
        model(torch.zeros(2, 3, 64, 64))


def test_a_network_for_another_number_of_channels_is_refused_with_its_first_layer():
    network = timm.create_model("test_resnet", features_only=True, in_chans=4)
    with pytest.raises(ValueError, match=r"conv1.0 \(Conv2d\), takes 4 channels, and images have 12"):
        build_spark(network, input_size=64, in_chans=12)
    assert build_spark(network, input_size=64, in_chans=4).decoder.proj.out_channels == 4


def test_a_method_that_predicts_another_number_of_channels_is_refused(monkeypatch):
    """Else one channel would be compared with each of three."""
    model = build_fcmae("convnextv2_atto", input_size=64, decoder_width=8, check=False)
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda *given: decode(*given)[:, :1])
    with pytest.raises(ValueError, match=r"decode must return \(3, 3, 32, 32\), .* got \(3, 1, 32, 32\)"):
        model(torch.randn(1, 3, 64, 64))


def test_a_base_that_predicts_nothing_says_so():
    with pytest.raises(NotImplementedError):
        Method.decode(None, [], None, None)
