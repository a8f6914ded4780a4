"""A file that holds no settings becomes a model by what its tensors tell."""

import pytest
import timm
import torch

from spark_fast import build_spark
from spark_fast.errors import CheckpointError, SettingsError
from spark_fast.weights.load_pretrained import load_pretrained
from spark_fast.weights.model_spec import UNUSED_WIDTH
from spark_fast.weights.spark_keys import spark_state_dict

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The published pair of files of a ResNet-18, which name no network."""
    folder = tmp_path_factory.mktemp("published")
    state = spark_state_dict(build_spark("resnet18", input_size=64, decoder_width=64, check=False))
    torch.save({"module": state, "input_size": [64, 96]}, folder / "whole.pth")
    prefix = "sparse_encoder.sp_cnn."
    torch.save({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, folder / "encoder.pth")
    return folder


def test_network_input_and_width_are_told_by_the_file(folder):
    found = load_pretrained(folder / "whole.pth")
    assert (found.spec.network, found.spec.input_size, found.spec.decoder_width) == ("resnet18", (64, 96), 64)
    assert not found.model.training
    state = torch.load(folder / "whole.pth", weights_only=True)["module"]
    assert all(torch.equal(v, state[k]) for k, v in spark_state_dict(found.model).items())


def test_an_encoder_alone_gets_a_new_decoder_and_says_so(folder, caplog):
    caplog.set_level("INFO", "spark_fast")
    found = load_pretrained(folder / "encoder.pth", input_size="32x64")
    assert (found.spec.decoder_width, found.model.input_size) == (UNUSED_WIDTH, (32, 64))
    assert not found.weights.state.has_decoder
    assert "loaded the encoder; the decoder keeps its initial values" in caplog.text


def test_the_network_may_be_named_by_its_short_name_and_must_fit(folder):
    with pytest.raises(CheckpointError, match=r"whole\.pth: the checkpoint does not fit this model. .*missing"):
        load_pretrained(folder / "whole.pth", "res50", "64")


def test_another_network_must_be_named(folder):
    torch.save(timm.create_model("resnet10t").state_dict(), folder / "other.pth")
    with pytest.raises(CheckpointError, match=r"only convnext_base.* are recognised: name the network with --model"):
        load_pretrained(folder / "other.pth")
    assert load_pretrained(folder / "other.pth", "resnet10t", "64").spec.network == "resnet10t"
    with pytest.raises(SettingsError, match="unknown model 'resnet10'"):
        load_pretrained(folder / "other.pth", "resnet10")
