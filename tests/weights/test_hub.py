"""A name of the Hub gets the weights that timm gets by it; where there is no network, the message says so."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file

from spark_fast import build_spark
from spark_fast.errors import CheckpointError
from spark_fast.networks import build_network
from spark_fast.weights.load import load_weights
from spark_fast.weights.read import read_weights

pytestmark = pytest.mark.usefixtures("one_thread")
NAME = "hf-hub:timm/resnet10t.test"


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The Hub's cache, with one network in it, and no network behind it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--timm--resnet10t.test"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    state = timm.create_model("resnet10t", num_classes=3).state_dict()
    save_file(state, snapshot / "model.safetensors")
    config = {"architecture": "resnet10t", "num_classes": 3, "pretrained_cfg": {"num_classes": 3, "classifier": "fc"}}
    (snapshot / "config.json").write_text(json.dumps(config))
    return state


def test_a_name_of_the_hub_is_a_source_of_weights_and_names_its_network(offline):
    assert read_weights(Path(NAME)).network == "resnet10t"
    model = build_spark("resnet10t", input_size=64, mask_ratio=0.5, decoder_width=32, check=False)
    load_weights(Path(NAME), model)
    for name, value in model.encoder.network.state_dict().items():
        assert torch.equal(value, offline[name]), name


def test_what_cannot_be_had_is_named_with_the_reason_and_the_way_round(offline):
    with pytest.raises(
        CheckpointError, match=r"hf-hub:timm/other cannot be downloaded from the Hugging Face Hub .*create_model"
    ):
        read_weights(Path("hf-hub:timm/other"))


def test_as_a_network_it_is_refused_with_what_to_give_instead():
    with pytest.raises(ValueError, match=r"'hf-hub:timm/a' names weights, not a network: .* --init_weight"):
        build_network("hf-hub:timm/a")
