"""The plain network has the features that were pre-trained, from whatever file its weights come."""

import pytest
import torch

from spark_fast import build_spark
from spark_fast.checkpoint.file import write
from spark_fast.errors import CheckpointError
from spark_fast.evaluation.backbone import build_backbone, build_classifier
from spark_fast.weights.read import read_weights
from spark_fast.weights.timm_keys import encoder_state_dict, write_encoder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pretrained():
    torch.manual_seed(0)
    return build_spark("resnet10t", input_size=64, mask_ratio=0.5, decoder_width=32).eval()


def stored(model, tmp_path, kind):
    """The same encoder in each of the forms in which one may be found."""
    path = tmp_path / "file.pth"
    settings = {"model": {"model": "resnet10t", "stages": 0}}
    if kind == "run folder":
        (tmp_path / "checkpoints").mkdir()
        write(tmp_path / "checkpoints" / "step_00000001.pth", {"model": model.state_dict(), "settings": settings})
        return tmp_path
    if kind == "exported":
        return write_encoder(encoder_state_dict(model, "resnet10t"), "resnet10t", tmp_path)
    if kind == "exported .pth":
        torch.save(encoder_state_dict(model, "resnet10t"), path)
    elif kind == "published":
        inner = encoder_state_dict(model, "resnet10t")
        state = {f"module.sparse_encoder.sp_cnn.{name}": value for name, value in inner.items()}
        torch.save({"module": {**state, "module.dense_decoder.x": torch.zeros(1)}}, path)
    else:
        write(path, {"model": model.state_dict(), "settings": settings})
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run folder", "checkpoint", "exported", "exported .pth", "published"])
def test_every_form_of_weights_gives_the_encoders_features(pretrained, tmp_path, kind):
    weights = read_weights(stored(pretrained, tmp_path, kind))
    assert weights.network == ("" if kind in ("published", "exported .pth") else "resnet10t")
    images = torch.randn(2, 3, 64, 64)
    everything = torch.ones(2, 2, 2, dtype=torch.bool)
    expected = pretrained.encode(images, everything)[-1].mean((2, 3))
    torch.testing.assert_close(build_backbone("resnet10t", 0, weights)(images), expected, rtol=1e-4, atol=1e-5)
    classifier = build_classifier("resnet10t", 0, weights, 7, 0.0, (64, 64)).eval()
    pooled = classifier.forward_head(classifier.forward_features(images), pre_logits=True)
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_of_fewer_stages_leaves_the_later_levels_to_fine_tuning_and_features_are_of_its_last(tmp_path, caplog):
    model = build_spark("resnet10t", input_size=64, decoder_width=32, stages=2)
    settings = {"model": {"model": "resnet10t", "stages": 2}}
    write(tmp_path / "c.pth", {"model": model.state_dict(), "settings": settings})
    weights = read_weights(tmp_path / "c.pth")
    assert weights.stages("resnet10t") == 2
    assert build_backbone("resnet10t", 2, weights)(torch.zeros(1, 3, 64, 64)).shape == (1, 128)
    with caplog.at_level("INFO", "spark_fast"):
        classifier = build_classifier("resnet10t", 2, weights, 3, 0.0, (64, 64))
    assert "these keep their initial values: fc.bias, fc.weight, layer3" in caplog.text
    assert torch.equal(classifier.layer2[0].conv1.weight, model.state_dict()["encoder.network.layer2.0.conv1.weight"])
    with pytest.raises(CheckpointError, match=r"It may have fewer levels \(--stages\). missing: layer3"):
        build_classifier("resnet10t", 0, weights, 3, 0.0, (64, 64))


def test_for_other_channels_weights_of_as_many_are_taken_and_of_three_adapted(tmp_path):
    first = {}
    for channels in (3, 4):
        torch.manual_seed(0)
        model = build_spark("test_resnet", input_size=64, decoder_width=32, in_chans=channels, check=False)
        (tmp_path / str(channels)).mkdir()
        path = write_encoder(encoder_state_dict(model, "test_resnet"), "test_resnet", tmp_path / str(channels))
        weights = read_weights(path)
        assert weights.in_chans("test_resnet") == channels
        backbone = build_backbone("test_resnet", 0, weights, in_chans=4)
        classifier = build_classifier("test_resnet", 0, weights, 5, 0.0, (64, 64), in_chans=4)
        assert backbone(torch.zeros(2, 4, 64, 64)).shape[0] == 2
        assert classifier(torch.zeros(2, 4, 64, 64)).shape == (2, 5)
        first[channels] = backbone.network.state_dict()["conv1.0.weight"]
        assert torch.equal(classifier.state_dict()["conv1.0.weight"], first[channels])
        trained = model.encoder.network.state_dict()["conv1.0.weight"]
        assert torch.equal(first[channels], trained if channels == 4 else trained[:, [0, 1, 2, 0]] * 0.75)
