"""A model is built again from the settings of a checkpoint, of this version or another."""

import dataclasses

import pytest
import torch

from spark_fast.errors import CheckpointError
from spark_fast.pipelines.transforms.resize import MEAN, STD
from spark_fast.training.settings import Settings
from spark_fast.weights.load_pretrained import load_pretrained
from spark_fast.weights.model_spec import KNOWN, ModelSpec


def test_settings_are_what_training_wrote():
    settings = Settings()
    settings.model.model, settings.model.mask_ratio, settings.model.decoder_width = "cnxS", 0.75, 512
    settings.model.stages, settings.data.input_size = 3, "192x256"
    assert ModelSpec.from_settings(settings.to_dict()) == ModelSpec("convnext_small", (192, 256), 0.75, 512, 3)


def test_what_an_older_version_did_not_write_is_the_default():
    assert ModelSpec.from_settings({}) == ModelSpec.from_settings(Settings().to_dict()) == ModelSpec("resnet50")
    assert ModelSpec.from_settings({"model": {"stages": 2}}) == ModelSpec("resnet50", stages=2)


def test_every_setting_of_data_and_model_is_known():
    """A new one must be looked at: does it change what the model is?"""
    assert {name: {f.name for f in dataclasses.fields(getattr(Settings(), name))} for name in KNOWN} == KNOWN


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"wings": 2}}, "model has an unknown setting: wings"),
        ({"data": {"channels": 12}}, "data has an unknown setting: channels"),
        ({"data": {"input_size": "wide"}}, "--input_size must be N or HxW in pixels, got 'wide'"),
        ({"model": {"stages": None}}, "NoneType"),
        ({"model": "resnet50"}, "model is 'resnet50'"),
    ],
    ids=lambda v: str(v),
)
def test_settings_of_a_later_version_are_refused_with_the_file(tmp_path, settings, message):
    torch.save({"model": {}, "settings": settings}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth has settings that this version cannot read .*" + message):
        load_pretrained(tmp_path / "a.pth")


def test_how_it_was_trained_by_a_later_version_does_not_matter():
    assert ModelSpec.from_settings({"optim": {"wings": 2}, "run": {"feathers": 3}}) == ModelSpec()


def test_the_model_is_built_as_it_is_specified():
    spec = ModelSpec("resnet10t", (64, 128), 0.5, 32, stages=2, encoder="masked")
    model = spec.build()
    assert (model.input_size, model.patch, model.grid, model.num_visible) == ((64, 128), 8, (8, 16), 64)
    assert type(model.encoder).__name__ == "MaskedEncoder"
    assert model.densify_projs[0].weight.shape[0] == 32


@pytest.mark.parametrize("method", ["spark", "fcmae"])
def test_the_channels_of_the_images_are_those_of_the_run(method):
    settings = Settings.of_method(method)
    settings.model.model, settings.data.in_chans, settings.data.input_size = "test_resnet", 12, "64"
    spec = ModelSpec.from_settings(settings.to_dict())
    assert spec.in_chans == 12
    model = spec.build()
    assert model.in_chans == 12
    assert spec.mean_and_std == ((), ())
    assert dataclasses.replace(spec, in_chans=3).mean_and_std == (MEAN, STD)
