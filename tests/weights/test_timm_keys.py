"""The encoder's weights in timm's names: timm loads them, and computes with them what was trained."""

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from spark_fast import build_spark
from spark_fast.encoder.verify import _randomise_constants
from spark_fast.weights.timm_keys import encoder_state_dict, timm_names, write_encoder

pytestmark = pytest.mark.usefixtures("one_thread")


def save_encoder(model, name, folder):
    return write_encoder(encoder_state_dict(model, name), name, folder)


def trained(name, encoder="packed"):
    torch.manual_seed(0)
    model = build_spark(name, input_size=64, mask_ratio=0.5, decoder_width=32, encoder=encoder)
    _randomise_constants(model.encoder)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["packed", "masked"])
@pytest.mark.parametrize(
    ("name", "untrained"),
    [("resnet10t", []), ("convnext_zepto_rms", ["head.norm.weight"]),
     ("convnext_atto", ["head.norm.weight", "head.norm.bias"])],
)  # fmt: skip
def test_timm_loads_the_file_and_computes_the_encoders_dense_features(tmp_path, name, untrained, encoder):
    model = trained(name, encoder)
    state = load_file(save_encoder(model, name, tmp_path))
    network = timm.create_model(name, num_classes=0)
    found = network.load_state_dict(state, strict=bool(not untrained))
    assert not found.unexpected_keys
    assert found.missing_keys == untrained
    own = model.encoder.network.state_dict()
    assert len(state) == len(own)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), sorted_like(own, state), strict=True))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network.eval().forward_intermediates(images, intermediates_only=True)
        features = model.encoder.eval()(images)
    for mine, theirs in zip(features, expected[-4:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def sorted_like(own, state):
    plain = {k.replace(".", "_"): v for k, v in own.items()}
    return [plain[k.replace(".", "_")] for k in state]


def test_the_file_says_what_it_is_of(tmp_path):
    path = save_encoder(trained("resnet10t"), "resnet10t", tmp_path)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "architecture": "resnet10t"}
    assert [p.name for p in tmp_path.iterdir()] == ["resnet10t_timm.safetensors"]


def test_your_own_network_keeps_its_names(tmp_path):
    model = trained("resnet10t")
    path = save_encoder(model, "package.module:function", tmp_path)
    assert path.name == "encoder.safetensors"
    assert set(load_file(path)) == set(model.encoder.network.state_dict())


@pytest.mark.parametrize(
    "name", ["tf_efficientnet_b0", "cspnext_m", "hrnet_w18_small", "xception41", "vgg11", "densenet121"]
)
def test_every_kind_of_features_only_network_has_its_names_in_timm(name):
    with torch.device("meta"):
        keys = list(timm.create_model(name, features_only=True).state_dict())
        full = timm.create_model(name, num_classes=0).state_dict()
    names = timm_names(keys, name)
    assert len(set(names.values())) == len(keys)
    assert set(names.values()) <= set(full)


def test_another_networks_name_is_refused_with_the_tensors_it_lacks():
    with pytest.raises(ValueError, match=r"timm's convnext_atto has no tensor for conv1"):
        encoder_state_dict(trained("resnet10t"), "convnext_atto")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OSError, match=r"cannot write .*nowhere"):
        save_encoder(trained("resnet10t"), "resnet10t", tmp_path / "nowhere")


def test_exporting_leaves_the_model_on_its_device_and_its_weights_alone():
    model = trained("resnet10t")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = encoder_state_dict(model, "resnet10t")
    assert all(v.is_contiguous() and v.device.type == "cpu" for v in state.values())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
