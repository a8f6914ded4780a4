"""The card says what is known, and only that."""

import json
from dataclasses import replace

import pytest

from spark_fast.training.settings import Settings
from spark_fast.weights.load_pretrained import Pretrained
from spark_fast.weights.model_card import CURVE_ROWS, model_card
from spark_fast.weights.model_spec import ModelSpec
from spark_fast.weights.read import RunRecord, State, Weights
from tests.weights.tiny import tiny_spark


@pytest.fixture(scope="module")
def model():
    return tiny_spark()


def pretrained(model, folder, record):
    settings = Settings().to_dict() if record else {}
    weights = Weights(folder / "a.pth", State({}, {}, [], True), "resnet18", settings, record, None)
    return Pretrained(weights, ModelSpec("resnet18", (64, 64), 0.5), model)


def test_of_a_published_file_only_the_network_and_the_patches_are_told(model, tmp_path):
    card = model_card(pretrained(model, tmp_path, None), "timm", ["fc.weight"], "import timm")
    assert card.startswith("# resnet18, pre-trained by SparK")
    assert "patches of 8 px. The features" in card
    assert "| step, epoch | not known |" in card
    assert "Not pre-trained, still at their initial values: `fc.weight`. Train them yourself." in card
    assert "## Settings" not in card
    assert "## Loss" not in card


def test_the_curve_ends_where_the_weights_are_from_and_leaves_out_what_is_no_number(model, tmp_path):
    (tmp_path / "config.toml").touch()
    rows = [{"step": epoch * 2 + i, "epoch": epoch, "loss": 1 / epoch + i} for epoch in range(1, 31) for i in (0, 1)]
    rows += [{"step": 61, "epoch": 30, "loss": None}, {"step": 62, "epoch": 31, "loss": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 63, "ep')
    (tmp_path / "log.txt").write_text('{"git_commit_id": "old"}\n{"git_commit_id": "abc", "cmd": "train a"}\n{"epoch"')
    record = RunRecord(61, 30, 0.25, {"torch": "2.15"})
    card = model_card(pretrained(model, tmp_path, record), "hf_folder", [], "import timm")
    curve = card.partition("## Loss")[2].partition("## Settings")[0]
    assert curve.count("\n| ") == CURVE_ROWS + 2
    assert "| 1 | 1.5000 |" in curve
    assert "| 30 | 0.5333 |" in curve
    assert "| 31 |" not in curve
    kept = ["| step, epoch | 61, 30 of 1600 |", "| loss | 0.2500 |", "| commit | abc |", "| command | `train a` |"]
    assert [part for part in (*kept, "| trained with | torch 2.15 |", "50% of them hidden") if part not in card] == []
    assert card.startswith("---\nlibrary_name: timm")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (ModelSpec("resnet18", (64, 64), 0.5), "input 64x64 px, normalised by ImageNet's mean and standard deviation."),
        (
            ModelSpec("resnet18", (64, 64), 0.5, in_chans=1),
            "64x64 px of 1 channel, normalised by an unknown mean and standard deviation",
        ),
        (
            ModelSpec("resnet18", (64, 64), 0.5, in_chans=2, mean=(0.1, 0.25), std=(0.5, 1.0)),
            "input 64x64 px of 2 channels, normalised by mean 0.1, 0.25 and standard deviation 0.5, 1.",
        ),
    ],
)
def test_the_channels_of_the_images_and_their_normalisation_are_told(model, tmp_path, spec, said):
    source = replace(pretrained(model, tmp_path, RunRecord(1, 1, 0.5, {})), spec=spec)
    assert said in model_card(source, "timm", [], "import timm")
