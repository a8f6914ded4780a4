"""Nothing is written that would not load as it should; networks that are unusual, or only in part, are exported too."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file

from spark_fast import build_spark
from spark_fast.errors import CheckpointError, SettingsError
from spark_fast.evaluation.backbone import build_backbone
from spark_fast.training.settings import Settings
from spark_fast.weights.export_formats import ExportFormat, _check_loads, export
from spark_fast.weights.load import load_weights
from spark_fast.weights.load_pretrained import load_pretrained
from spark_fast.weights.read import read_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def saved(folder, network, *, stages=None, change=None, in_chans=3):
    """A checkpoint of ours."""
    settings = Settings()
    settings.data.input_size, settings.model.decoder_width = "64", 32
    settings.model.model, settings.model.stages, settings.data.in_chans = network, stages or 0, in_chans
    options = {"input_size": 64, "mask_ratio": 0.6, "decoder_width": 32}
    model = build_spark(network, **options, stages=stages, in_chans=in_chans, check=False)
    state = model.state_dict()
    if change:
        state[change].view(-1)[0] = torch.nan
    torch.save({"model": state, "settings": settings.to_dict()}, folder / "ckpt.pth")
    return folder / "ckpt.pth", state


def test_the_stages_that_were_not_trained_are_listed_and_the_file_still_loads_strictly(tmp_path):
    path, state = saved(tmp_path, "resnet10t", stages=3)
    made = export(load_pretrained(path), "timm", tmp_path / "a.safetensors")
    assert {name.partition(".")[0] for name in made.new} == {"layer4"}
    loaded = timm.create_model("resnet10t", num_classes=0, checkpoint_path=str(tmp_path / "a.safetensors"))
    name = "layer3.0.conv1.weight"
    assert torch.equal(loaded.state_dict()[name], state[f"encoder.network.{name}"])
    again = export(load_pretrained(path), "timm", tmp_path / "b.safetensors")
    assert all(torch.equal(v, again.state[k]) for k, v in made.state.items())


def test_an_export_of_some_stages_is_evaluated_like_its_run_and_untrained_tensors_are_not_read(tmp_path, caplog):
    caplog.set_level("INFO", "spark_fast")
    path, _ = saved(tmp_path, "resnet10t", stages=3)
    export(load_pretrained(path), "timm", tmp_path / "a.safetensors")
    weights, of_run = read_weights(tmp_path / "a.safetensors"), read_weights(path)
    assert weights.stages("resnet10t") == of_run.stages("resnet10t") == 3
    assert "not read, because they were not pre-trained: layer4.0.conv1.weight, " in caplog.text
    images = torch.randn(2, 3, 32, 32)
    features = [build_backbone("resnet10t", 3, found)(images) for found in (weights, of_run)]
    assert torch.equal(*features)
    assert load_pretrained(tmp_path / "a.safetensors").spec.stages == 3
    assert "cannot say" not in caplog.text
    export(load_pretrained(path), "timm", tmp_path / "a.pth")
    assert "a.pth cannot say that only the first 3 levels were pre-trained: give spark-fast-eval --stag" in caplog.text


def test_the_published_format_tells_its_levels_by_its_decoder(tmp_path):
    path, state = saved(tmp_path, "resnet10t", stages=3)
    export(load_pretrained(path), "spark", tmp_path / "a.pth")
    again = load_pretrained(tmp_path / "a.pth")
    assert again.spec.stages == 3
    assert all(torch.equal(v, state[k]) for k, v in again.model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"does not fit this model. It has 3 levels \(--stages 3\). wrong shape"):
        load_weights(tmp_path / "a.pth", build_spark("resnet10t", input_size=64, decoder_width=32, check=False))
    export(load_pretrained(saved(tmp_path, "resnet10t")[0]), "spark", tmp_path / "whole.pth")
    assert load_pretrained(tmp_path / "whole.pth").spec.stages == 0


def test_your_own_network_leaves_under_its_own_names_when_you_name_it(tmp_path, monkeypatch):
    code = "import timm\n\ndef make():\n    return timm.create_model('resnet10t', features_only=True)\n"
    (tmp_path / "own_exported.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    path, state = saved(tmp_path, "own_exported:make")
    with pytest.raises(SettingsError, match="pass --model own_exported:make"):
        load_pretrained(path)
    source = load_pretrained(path, "own_exported:make")
    export(source, "safetensors", tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == {k.removeprefix("encoder.network.") for k in state if k.startswith("encoder.")}
    with pytest.raises(SettingsError, match="your own network, which timm does not have"):
        export(source, "timm", tmp_path / "b.safetensors")


def official_convnext(depths, dims):
    """Name -> shape of facebookresearch/ConvNeXt (models/convnext.py), which the published fine-tuning builds."""
    found = {"norm": [dims[3:]] * 2, "head": [(1000, dims[3]), (1000,)]}
    found |= {"downsample_layers.0.0": [(dims[0], 3, 4, 4), dims[:1]], "downsample_layers.0.1": [dims[:1]] * 2}
    for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        if i:
            found[f"downsample_layers.{i}.0"] = [dims[i - 1 : i]] * 2
            found[f"downsample_layers.{i}.1"] = [(dim, dims[i - 1], 2, 2), (dim,)]
        for j in range(depth):
            layers = {"dwconv": (dim, 1, 7, 7), "norm": (dim,), "pwconv1": (4 * dim, dim), "pwconv2": (dim, 4 * dim)}
            found |= {f"stages.{i}.{j}.{name}": [shape, shape[:1]] for name, shape in layers.items()}
    shapes = {
        f"{name}.{part}": tuple(both[i]) for name, both in found.items() for i, part in ((0, "weight"), (1, "bias"))
    }
    gammas = {f"stages.{i}.{j}.gamma": (dims[i],) for i, depth in enumerate(depths) for j in range(depth)}
    return shapes | gammas


@pytest.mark.slow
def test_a_convnext_leaves_in_the_official_names_and_nothing_of_it_is_left_for_the_published_loader_to_miss(tmp_path):
    path, state = saved(tmp_path, "convnext_tiny")
    export(load_pretrained(path), "spark_encoder", tmp_path / "a.pth")
    found = torch.load(tmp_path / "a.pth", weights_only=True)
    wanted = official_convnext((3, 3, 9, 3), (96, 192, 384, 768))
    assert set(wanted) - set(found) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert {k: tuple(v.shape) for k, v in found.items()}.items() <= wanted.items()
    one, other = "stages.2.8.pwconv1.weight", "encoder.network.stages_2.blocks.8.mlp.fc1.weight"
    assert torch.equal(found[one], state[other])


def test_what_the_published_code_cannot_build_is_said(tmp_path):
    path, _ = saved(tmp_path, "resnet10t")
    usage = export(load_pretrained(path), "spark", tmp_path / "a.pth").usage
    assert "the published code has no such resnet10t, no decoder 32 wide, only 768: this file is for other" in usage


def test_numbers_that_are_not_finite_are_not_written(tmp_path):
    path, _ = saved(tmp_path, "resnet10t", change="encoder.network.bn1.weight")
    with pytest.raises(CheckpointError, match=r"NaN or infinity, for example in bn1\.weight"):
        export(load_pretrained(path), "timm", tmp_path / "a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pth"]


@pytest.mark.parametrize(
    "loaded", [{"a": torch.ones(2)}, {"a": torch.zeros(2), "b": torch.zeros(1)}, {"a": torch.zeros(2).half()}, {}]
)
def test_what_loads_as_something_else_is_refused(tmp_path, loaded):
    made = ExportFormat({"a": torch.zeros(2)}, [], (".pth",), lambda path: loaded, "")
    with pytest.raises(CheckpointError, match="was not written, because these tensors change when it is loaded"):
        _check_loads(made, tmp_path / "a.pth", tmp_path / "a.pth")


@pytest.mark.parametrize("channels", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_weights_for_other_channels_leave_for_them_and_come_back(tmp_path, channels):
    path, state = saved(tmp_path, "test_resnet", in_chans=channels)
    source = load_pretrained(path)
    first = state["encoder.network.conv1.0.weight"]
    usage = export(source, "timm", tmp_path / "a.safetensors").usage
    assert f'timm.create_model("test_resnet", in_chans={channels}, num_classes=0, ' in usage
    network = timm.create_model("test_resnet", in_chans=channels, num_classes=0)
    network.load_state_dict(load_file(tmp_path / "a.safetensors"), strict=True)
    assert torch.equal(network.conv1[0].weight, first)
    again = load_pretrained(tmp_path / "a.safetensors")
    assert again.spec.in_chans == channels
    assert torch.equal(again.model.encoder.network.conv1[0].weight, first)

    export(source, "hf_folder", tmp_path / "folder")
    network = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    assert torch.equal(network.conv1[0].weight, first)
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [channels, 64, 64]
    assert config["model_args"] == {"in_chans": channels}
    assert "mean" not in config["pretrained_cfg"]

    usage = export(source, "spark", tmp_path / "spark.pth").usage
    assert f"no images of {channels} channel" in usage
    again = load_pretrained(tmp_path / "spark.pth", "test_resnet")
    assert again.spec.in_chans == channels
    assert all(torch.equal(v, state[k]) for k, v in again.model.state_dict().items())

    export(source, "safetensors", tmp_path / "b.safetensors")
    assert torch.equal(load_file(tmp_path / "b.safetensors")["conv1.0.weight"], first)


def test_torchvision_has_networks_for_three_channels_alone(tmp_path):
    path, _ = saved(tmp_path, "resnet18", in_chans=4)
    with pytest.raises(SettingsError, match="take images of 3 channels, these weights take 4: choose --to timm"):
        export(load_pretrained(path), "torchvision", tmp_path / "a.pth")


def test_the_statistics_of_the_images_are_exported_where_they_are_known(tmp_path):
    path, _ = saved(tmp_path, "test_resnet", in_chans=2)
    source = load_pretrained(path)
    source = replace(source, spec=replace(source.spec, mean=(0.1, 0.2), std=(0.3, 0.4)))
    export(source, "hf_folder", tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert (config["pretrained_cfg"]["mean"], config["pretrained_cfg"]["std"]) == ([0.1, 0.2], [0.3, 0.4])
