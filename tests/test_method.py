"""What every method has; a method of one's own, and one beside SparK, in the trainer."""

import re
from pathlib import Path

import pytest
import torch

from spark_fast import pretrain
from spark_fast.checkpoint.file import read
from spark_fast.errors import CheckpointError, SettingsError
from spark_fast.fcmae import FCMAE
from spark_fast.method import METHODS, Method, method_class
from spark_fast.spark import SparK
from spark_fast.weights.load_pretrained import load_pretrained
from tests.pipelines.pictures import jpeg

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
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
    """The class that docs/methods.md shows."""
    shown = re.search(r"```python\n(.*?)model = build", PAGE.read_text(), re.DOTALL)[1]
    (tmp_path / "my_method.py").write_text(shown)
    monkeypatch.syspath_prepend(tmp_path)
    settings = {**SETTINGS, "method": "my_method:OneLayer", "exp_dir": tmp_path / "run"}
    assert not pretrain(images, **settings, max_steps=1).finished
    assert pretrain(images, **settings, resume="auto").finished
    assert list((tmp_path / "run" / "reconstruction").iterdir())
    with pytest.raises(CheckpointError, match="a method of your own, my_method:OneLayer"):
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


def test_a_base_that_predicts_nothing_says_so():
    with pytest.raises(NotImplementedError):
        Method.decode(None, [], None, None)
