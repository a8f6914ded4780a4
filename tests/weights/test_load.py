"""Weights to begin a run from: ours, published ones, and encoders in timm's names, as .pth and as .safetensors."""

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from spark_fast import build_spark
from spark_fast.errors import CheckpointError
from spark_fast.weights.load import load_into_network, load_into_spark, load_weights
from spark_fast.weights.read import read_weights
from spark_fast.weights.spark_keys import spark_state_dict
from spark_fast.weights.timm_keys import encoder_state_dict, write_encoder
from tests.weights.tiny import tiny_spark

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_weights_of_our_own_checkpoints_are_loaded_whatever_wrapped_the_model(tmp_path, prefix):
    model = tiny_spark()
    path = tmp_path / "weights.pth"
    torch.save({"model": {prefix + k: v for k, v in model.state_dict().items()}, "epoch": 3}, path)
    other = tiny_spark(seed=1)
    load_weights(path, other)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_of_published_checkpoints_are_loaded(tmp_path, wrapped):
    source, target = (build_spark("resnet10t", input_size=64, mask_ratio=0.5, decoder_width=32) for _ in range(2))
    state = {
        k.replace("encoder.network.", "sparse_encoder.sp_cnn.").replace("decoder.", "dense_decoder.", 1)
        if k.startswith(("encoder.network.", "decoder.")) and not k.startswith("encoder.network.decoder")
        else k: v
        for k, v in source.state_dict().items()
    }
    assert any(k.startswith("dense_decoder.dec.0") for k in state)
    torch.save({"module": state} if wrapped else state, tmp_path / "published.pth")
    load_weights(tmp_path / "published.pth", target)
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in target.state_dict().items())


def test_an_encoder_is_loaded_into_a_model_in_channels_last_whose_decoder_stays_as_it_is(tmp_path):
    """A layer of one output channel then has the strides of two layouts at once."""
    target = build_spark("resnet10t", input_size=64, mask_ratio=0.5, decoder_width=32, check=False)
    target.to(memory_format=torch.channels_last)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    network = timm.create_model("resnet10t")
    torch.save(network.state_dict(), tmp_path / "timm.pth")
    load_weights(tmp_path / "timm.pth", target)
    after = target.state_dict()
    assert torch.equal(after["encoder.network.layer1.0.conv1.weight"], network.layer1[0].conv1.weight)
    assert all(torch.equal(after[name], value) for name, value in before.items() if not name.startswith("encoder."))


@pytest.mark.parametrize("content", [{"model": {"a": torch.zeros(1)}}, {"a": torch.zeros(1)}, {}])
def test_weights_that_do_not_fit_are_refused_with_the_file_and_the_tensors(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth: the checkpoint does not fit this model.*conv1\.weight"):
        load_weights(tmp_path / "other.pth", tiny_spark())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({1: torch.zeros(1)}, "not in this model: 1"),
        ({**tiny_spark().state_dict(), "decoder.proj.bias": 3},
         r"missing: decoder\.proj\.bias. not in this model: decoder\.proj\.bias \(int\)"),
    ],
    ids=["number", "no tensor"],
)  # fmt: skip
def test_a_dictionary_of_other_things_is_refused_as_weights(tmp_path, content, message):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=rf"other\.pth: .*{message}"):
        load_weights(tmp_path / "other.pth", tiny_spark())


def small(name="resnet10t", seed=0):
    torch.manual_seed(seed)
    return build_spark(name, input_size=64, mask_ratio=0.5, decoder_width=32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
def test_an_exported_encoder_is_an_encoder_to_begin_from(tmp_path, name, caplog):
    source, target = small(name), small(name, seed=1)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    caplog.set_level("INFO", "spark_fast")
    load_weights(write_encoder(encoder_state_dict(source, name), name, tmp_path), target)
    for k, v in target.state_dict().items():
        expected = source.state_dict()[k] if k.startswith("encoder.network.") else before[k]
        assert torch.equal(v, expected), k
    assert "loaded the encoder; the decoder keeps its initial values; ignored: nothing" in caplog.text


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
def test_a_classifier_of_timm_is_an_encoder_with_something_left_out(tmp_path, name, caplog):
    caplog.set_level("INFO", "spark_fast")
    classifier, target = timm.create_model(name), small(name)
    safetensors.torch.save_file(classifier.state_dict(), tmp_path / "timm.safetensors")
    load_weights(tmp_path / "timm.safetensors", target)
    first = next(iter(classifier.state_dict().values()))
    assert torch.equal(next(iter(target.encoder.network.state_dict().values())), first)
    assert ("fc.bias, fc.weight" if name == "resnet10t" else "head.fc.bias, head.fc.weight") in caplog.text


def test_a_whole_model_as_safetensors_is_loaded_whole(tmp_path):
    source, target = small(), small(seed=1)
    safetensors.torch.save_file({k: v.contiguous() for k, v in source.state_dict().items()}, tmp_path / "a.safetensors")
    load_weights(tmp_path / "a.safetensors", target)
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in target.state_dict().items())


def test_half_an_encoder_is_refused_by_name_and_changes_nothing(tmp_path):
    target = small()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    state = timm.create_model("resnet10t").state_dict()
    del state["layer1.0.conv1.weight"]
    safetensors.torch.save_file(state, tmp_path / "half.safetensors")
    with pytest.raises(CheckpointError, match=r"half\.safetensors: the checkpoint does not fit this model"):
        load_weights(tmp_path / "half.safetensors", target)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


def test_how_many_tensors_of_encoder_and_decoder_were_loaded_is_said(tmp_path, caplog):
    caplog.set_level("INFO", "spark_fast")
    source, target = small(), small(seed=1)
    encoder = sum(name.startswith("encoder.") for name in source.state_dict())
    torch.save(spark_state_dict(source), tmp_path / "whole.pth")
    load_weights(tmp_path / "whole.pth", target)
    decoder = len(source.state_dict()) - encoder
    counted = f"{encoder} of the encoder's {encoder} tensors loaded, {{}} of the decoder's {decoder}"
    assert counted.format(decoder) in caplog.text
    load_weights(write_encoder(encoder_state_dict(source, "resnet10t"), "resnet10t", tmp_path), target)
    assert counted.format(0) in caplog.text


FORMS = {  # what other programs save of a network -> where it is found in there, "" where that goes without saying
    "lightning": (lambda sd: {"state_dict": {f"model.{k}": v for k, v in sd.items()}, "epoch": 3}, "model"),
    "wrapper": (lambda sd: {f"backbone.{k}": v for k, v in sd.items()}, "backbone"),
    "encoder": (lambda sd: {"state_dict": {f"encoder.{k}": v for k, v in sd.items()}}, "state_dict.encoder"),
    "one of two": (lambda sd: {"teacher": {f"module.{k}": v for k, v in sd.items()}}, "teacher.module"),
    "compiled": (lambda sd: {"net": {f"_orig_mod.{k}": v for k, v in sd.items()}}, "net._orig_mod"),
    "ddp": (lambda sd: {"model": {f"module.{k}": v for k, v in sd.items()}}, ""),
    "no counters": (lambda sd: {k: v for k, v in sd.items() if "num_batches" not in k}, ""),
    "half": (lambda sd: {k: v.half() if v.is_floating_point() else v for k, v in sd.items()}, ""),
    "two copies": (lambda sd: {"model": sd, "model_ema": {k: v + 1 for k, v in sd.items()}}, ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_network_in_the_forms_of_other_programs_is_loaded_and_its_place_is_said(tmp_path, caplog, form):
    caplog.set_level("INFO", "spark_fast")
    state = timm.create_model("resnet10t").state_dict()
    make, place = FORMS[form]
    torch.save(make(state), tmp_path / "a.pth")
    target, network = small(), timm.create_model("resnet10t", num_classes=0)
    weights = read_weights(tmp_path / "a.pth")
    load_into_spark(weights, target)
    load_into_network(weights, network, new=set())
    for found in (target.encoder.network.state_dict(), network.state_dict()):
        for name, value in found.items():
            expected = state[name].half() if form == "half" else state[name]
            assert torch.equal(value, expected.to(value.dtype)), name
    said = [message for message in caplog.messages if "reading the network under" in message]
    assert said == ([f"{tmp_path / 'a.pth'}: reading the network under {place}"] * 2 if place else [])
    assert ("model_ema fits as well; choose it by" in caplog.text) == (form == "two copies")


def test_where_two_places_fit_they_are_named_and_one_may_be_chosen(tmp_path):
    state = timm.create_model("resnet10t").state_dict()
    other = {name: value + 1 for name, value in state.items()}
    torch.save({"student": state, "teacher": {f"module.{k}": v for k, v in other.items()}}, tmp_path / "a.pth")
    target = small()
    with pytest.raises(
        CheckpointError, match=r"a\.pth: several models in it fit: student, teacher\.module\. Choose one"
    ):
        load_weights(tmp_path / "a.pth", target)
    load_weights(tmp_path / "a.pth#teacher", target)
    assert torch.equal(target.encoder.network.state_dict()["bn1.weight"], other["bn1.weight"])
    with pytest.raises(CheckpointError, match=r"a\.pth has no tensor under ema: its names begin with student, teacher"):
        load_weights(tmp_path / "a.pth#ema", target)
    torch.save(state, tmp_path / "b.pth#ema")
    load_weights(tmp_path / "b.pth#ema", target)


@pytest.mark.parametrize("place", ["", "model.backbone."])
def test_weights_of_another_network_are_named_as_what_they_are(tmp_path, place):
    torch.save({place + k: v for k, v in timm.create_model("resnet18").state_dict().items()}, tmp_path / "a.pth")
    weights = read_weights(tmp_path / "a.pth")
    message = r"does not fit this model\. It looks like resnet18 \(--model resnet18\)"
    with pytest.raises(CheckpointError, match=message):
        load_into_spark(weights, small())
    with pytest.raises(CheckpointError, match=message):
        load_into_network(weights, timm.create_model("resnet10t"), new=set())
    assert weights.network == "resnet18"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.fill_(torch.nan), r"it holds NaN or infinity, for example in bn1\.weight \(weights of a run"),
        (lambda v: v.fill_(torch.inf), "NaN or infinity"),
        (lambda v: v.long(), r"bn1\.weight is int64, strided, the model's float32"),
        (lambda v: v.to("meta"), r"bn1\.weight is without data, the model's float32"),
        (lambda v: v.to_sparse(), r"bn1\.weight is float32, sparse_coo, the model's float32"),
        (lambda v: v.to(torch.complex64), "bn1.weight is complex64"),
    ],
)
def test_numbers_that_no_network_can_have_are_named_and_nothing_is_loaded(tmp_path, change, message):
    state, target = timm.create_model("resnet10t").state_dict(), small()
    torch.save(state | {"bn1.weight": change(state["bn1.weight"].clone())}, tmp_path / "a.pth")
    before = {k: v.clone() for k, v in target.state_dict().items()}
    weights = read_weights(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=rf"a\.pth: .*{message}"):
        load_into_spark(weights, target)
    with pytest.raises(CheckpointError, match=rf"a\.pth: .*{message}"):
        load_into_network(weights, timm.create_model("resnet10t"), new=set())
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


def plain(wrapper):
    """A plain network, alone or where timm's feature extractors put it."""
    network = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1)})
    return nn.ModuleDict({wrapper: network}) if wrapper else network


@pytest.mark.parametrize(("written", "read"), [("model", ""), ("", "model"), ("body", ""), ("", "body"), ("", "")])
def test_a_plain_network_is_found_with_and_without_timms_wrapper(tmp_path, written, read):
    source, target = plain(written), plain(read)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    load_into_network(read_weights(tmp_path / "a.pth"), target, new=set())
    for mine, theirs in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_only_what_may_begin_anew_may_be_missing_or_of_another_shape(tmp_path, caplog):
    caplog.set_level("INFO", "spark_fast")
    source, target = timm.create_model("resnet10t", num_classes=5), timm.create_model("resnet10t", num_classes=7)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    weights, before = read_weights(tmp_path / "a.pth"), target.fc.weight.clone()
    with pytest.raises(
        CheckpointError, match=r"a\.pth: .*wrong shape: fc\.weight is \(5, 512\), the model's \(7, 512\)"
    ):
        load_into_network(weights, target, new=set())
    load_into_network(weights, target, new={"fc.weight", "fc.bias"})
    assert torch.equal(target.fc.weight, before)
    assert torch.equal(target.layer4[0].conv1.weight, source.layer4[0].conv1.weight)
    assert "these keep their initial values: fc.bias, fc.weight" in caplog.text


def three_channels(folder, name="test_resnet"):
    """A file of timm's network, whole, and its state."""
    torch.manual_seed(0)
    state = timm.create_model(name).state_dict()
    safetensors.torch.save_file(state, folder / f"{name}.safetensors", {"format": "pt"})
    return folder / f"{name}.safetensors", state


@pytest.mark.parametrize("channels", [1, 2, 4, 12])
def test_a_first_layer_of_three_channels_is_adapted_as_timm_does_it_and_that_is_said(tmp_path, caplog, channels):
    path, state = three_channels(tmp_path)
    overlay = {"file": str(path)}
    theirs = timm.create_model("test_resnet", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=channels)
    model = build_spark("test_resnet", input_size=64, decoder_width=32, in_chans=channels, check=False)
    with caplog.at_level("INFO", "spark_fast"):
        load_weights(path, model)
    ours = model.encoder.network.state_dict()
    assert ours.keys() <= theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.items())
    assert not torch.equal(ours["conv1.0.weight"][:, :1], state["conv1.0.weight"][:, :1])
    assert f"conv1.0.weight takes three channels and was adapted to {channels}: " in caplog.text
    network = timm.create_model("test_resnet", features_only=True, in_chans=channels)
    with pytest.raises(CheckpointError, match=r"It takes images of 3 channels \(--in_chans 3\)"):
        load_into_network(read_weights(path), network, set())
    load_into_network(read_weights(path), network, set(), in_chans=channels)
    assert torch.equal(network.state_dict()["conv1.0.weight"], ours["conv1.0.weight"])


def test_of_a_model_with_a_decoder_for_three_channels_the_encoder_alone_is_taken(tmp_path, caplog):
    options = {"input_size": 64, "decoder_width": 32, "check": False}
    source, target = (build_spark("test_resnet", **options, in_chans=n) for n in (3, 4))
    torch.save({"model": source.state_dict()}, tmp_path / "a.pth")
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with caplog.at_level("INFO", "spark_fast"):
        load_weights(tmp_path / "a.pth", target)
    for name, value in target.state_dict().items():
        if name != "encoder.network.conv1.0.weight":
            assert torch.equal(value, (source.state_dict() if name.startswith("encoder.") else before)[name]), name
    assert "conv1.0.weight takes three channels and was adapted to 4: repeated, and scaled by 3 / 4" in caplog.text
    assert "loaded the encoder; the decoder keeps its initial values" in caplog.text
    torch.save({"model": {**source.state_dict(), "encoder.network.layer9.weight": torch.zeros(2)}}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match=r"not in this model: encoder\.network\.layer9\.weight"):
        load_weights(tmp_path / "b.pth", target)


@pytest.mark.parametrize(("there", "here"), [(12, 3), (4, 12), (1, 3)])
def test_weights_for_other_than_three_channels_are_refused_with_their_number(tmp_path, there, here):
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", in_chans=there).state_dict(), tmp_path / "a.pth")
    model = build_spark("test_resnet", input_size=64, decoder_width=32, in_chans=here, check=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    message = rf"It takes images of {there} channels? \(--in_chans {there}\)\. wrong shape: .*conv1\.0\.weight is"
    with pytest.raises(CheckpointError, match=message):
        load_weights(tmp_path / "a.pth", model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("spoilt", [torch.Tensor.to_sparse, torch.Tensor.int])
def test_a_first_layer_of_three_channels_that_is_no_dense_tensor_of_fractions_is_refused(tmp_path, spoilt):
    state = timm.create_model("test_resnet").state_dict()
    torch.save({**state, "conv1.0.weight": spoilt(state["conv1.0.weight"])}, tmp_path / "a.pth")
    model = build_spark("test_resnet", input_size=64, decoder_width=32, in_chans=4, check=False)
    with pytest.raises(CheckpointError, match=r"wrong shape: .*conv1\.0\.weight is \(16, 3, 3, 3\)"):
        load_weights(tmp_path / "a.pth", model)
