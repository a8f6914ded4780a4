"""Weights of the published FCMAE: the trainer's layout, the released files' names, and timm's."""

import pytest
import timm
import torch

from spark_fast.errors import CheckpointError
from spark_fast.fcmae import build_fcmae
from spark_fast.weights.export_formats import EXPORT_FORMATS
from spark_fast.weights.fcmae_keys import from_published, is_published_fcmae
from spark_fast.weights.load import load_weights
from spark_fast.weights.load_pretrained import load_pretrained
from spark_fast.weights.spark_keys import OFFICIAL, canonical_name

ATTO = {"input_size": 64, "mask_ratio": 0.5, "decoder_width": 24, "check": False}


def as_published(model):
    """The state of a model as the published trainer saves it, written from its description tap by tap."""
    import re

    found = {}
    for name, value in model.state_dict().items():
        inner = name.removeprefix("encoder.network.")
        official = inner
        for pattern, replacement in OFFICIAL:
            official = re.sub(pattern, replacement, official)
        if inner == name:  # of the decoder: dense layers, in the official names of a block
            for ours, theirs in (("conv_dw", "dwconv"), ("mlp.fc", "pwconv"), ("mlp.grn.weight", "grn.gamma")):
                official = official.replace(ours, theirs)
            official = official.replace("mlp.grn.bias", "grn.beta")
            found[official] = value[None] if "grn." in official else value
            continue
        official = f"encoder.{official}"
        stem = ".downsample_layers.0." in official
        if value.dim() == 4 and not stem and "pwconv" not in official:
            found[official.replace(".weight", ".kernel")] = kernel(value)
        elif "grn." in official:
            found[official] = value[None]
        elif "pwconv" in official:
            found[official.replace("pwconv1.", "pwconv1.linear.").replace("pwconv2.", "pwconv2.linear.")] = (
                value.flatten(1) if value.dim() == 4 else value
            )
        elif ".norm." in official or (".0." in official and not stem and "downsample" in official):
            found[re.sub(r"\.(weight|bias)$", r".ln.\1", official)] = value
        elif official.endswith(".bias") and not stem:
            found[official] = value[None]
        else:
            found[official] = value
    return found


def kernel(weight):
    """(O, C, k, k) -> (k*k, C, O), depthwise (k*k, C): tap = column * k + row."""
    o, c, k, _ = weight.shape
    taps = torch.stack([weight[:, :, tap % k, tap // k].t() for tap in range(k * k)])  # (k*k, C, O)
    return taps[:, 0] if c == 1 and o > 1 else taps


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = build_fcmae("convnextv2_atto", **ATTO)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def test_the_trainers_layout_becomes_that_of_dense_layers(model):
    published = as_published(model)
    assert is_published_fcmae(published)
    assert any(name.endswith(".kernel") and value.dim() == 2 for name, value in published.items())
    found = from_published(published)
    for name, value in model.state_dict().items():
        assert torch.equal(found[canonical_name(name)].reshape(value.shape), value), name


def test_a_checkpoint_of_the_published_trainer_is_loaded_whole(model, tmp_path):
    path = tmp_path / "checkpoint-799.pth"
    torch.save({"model": as_published(model), "epoch": 799}, path)
    fresh = build_fcmae("convnextv2_atto", **ATTO)
    load_weights(path, fresh)
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), model.state_dict().values(), strict=True))
    told = load_pretrained(path, input_size="64")
    assert (told.spec.network, told.spec.method, told.spec.decoder_width, told.spec.decoder_depth) == (
        "convnextv2_atto", "fcmae", 24, 1,
    )  # fmt: skip


def test_released_weights_in_dense_names_are_an_encoder(model, tmp_path):
    """Official names, GRN's tensors (1, 1, 1, C), linear layers for atto's 1x1 convolutions."""
    import re

    released = {}
    for name, value in model.encoder.network.state_dict().items():
        for pattern, replacement in OFFICIAL:
            name = re.sub(pattern, replacement, name)
        value = value.flatten(1) if "pwconv" in name and value.dim() == 4 else value
        released[name] = value[None, None, None] if "grn." in name else value
    path = tmp_path / "convnextv2_atto_1k_224_fcmae.pt"
    torch.save({"model": released}, path)
    fresh = build_fcmae("convnextv2_atto", **ATTO)
    load_weights(path, fresh)
    assert all(
        torch.equal(a, b)
        for a, b in zip(fresh.encoder.state_dict().values(), model.encoder.state_dict().values(), strict=True)
    )


def test_exported_to_timm_it_loads_strictly(model, tmp_path):
    path = tmp_path / "checkpoint-799.pth"
    torch.save({"model": as_published(model)}, path)
    source = load_pretrained(path, input_size="64")
    state = EXPORT_FORMATS["timm"](source).state
    network = timm.create_model("convnextv2_atto", num_classes=0)
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"head.norm.weight", "head.norm.bias"}, "the norm before the classifier is not pre-trained"
    images = torch.randn(1, 3, 64, 64)
    dense = model.eval().encoder(images)[-1]
    torch.testing.assert_close(network.eval().forward_features(images), dense, rtol=1e-4, atol=1e-4)


def test_the_published_form_of_spark_is_refused_for_fcmae(model, tmp_path):
    path = tmp_path / "checkpoint-799.pth"
    torch.save({"model": as_published(model)}, path)
    with pytest.raises(ValueError, match="was trained by the method fcmae"):
        EXPORT_FORMATS["spark"](load_pretrained(path, input_size="64"))


def test_a_kernel_that_is_no_square_is_named(model, tmp_path):
    published = as_published(model)
    name = "encoder.stages.0.0.dwconv.kernel"
    published[name] = published[name][:48]
    path = tmp_path / "odd.pth"
    torch.save({"model": published}, path)
    with pytest.raises(CheckpointError, match=f"{name} has 48 taps"):
        load_weights(path, build_fcmae("convnextv2_atto", **ATTO))
