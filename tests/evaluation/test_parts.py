"""The parts of an evaluation, each against its formula or its published figures."""

import pytest
import timm
import torch

from spark_fast import build_spark
from spark_fast.checkpoint.file import write
from spark_fast.errors import CheckpointError
from spark_fast.evaluation.accuracy import Scores
from spark_fast.evaluation.backbone import build_backbone, build_classifier
from spark_fast.evaluation.eval_settings import parse
from spark_fast.evaluation.knn import nearest, votes
from spark_fast.evaluation.layer_decay import parameter_groups
from spark_fast.evaluation.mixup import Augment, Mix
from spark_fast.evaluation.recipes import RECIPES, recipe_for
from spark_fast.evaluation.report import draw_confusion
from spark_fast.evaluation.weights import read_weights
from spark_fast.weights.timm_keys import encoder_state_dict, write_encoder

CPU = torch.device("cpu")
PUBLISHED = {  # SparK, downstream_imagenet/arg.py: bs, ep, wp_ep, opt, base_lr, lr_scale, wd, mixup, rep_aug, dp, ema
    "convnext_small": (4096, 400, 20, "adamw", 0.0002, 0.7, 0.01, 0.8, 3, 0.3, 0.9999),
    "convnext_base": (4096, 400, 20, "adamw", 0.0001, 0.7, 0.01, 0.8, 3, 0.4, 0.9999),
    "convnext_large": (4096, 200, 10, "adamw", 0.0001, 0.7, 0.02, 0.8, 3, 0.5, 0.9999),
    "resnet50": (2048, 300, 5, "lamb", 0.002, 0.7, 0.02, 0.1, 1, 0.05, 0.9999),
    "resnet101": (2048, 300, 5, "lamb", 0.001, 0.8, 0.02, 0.1, 1, 0.2, 0.9999),
    "resnet152": (2048, 300, 5, "lamb", 0.001, 0.8, 0.02, 0.1, 1, 0.2, 0.9999),
    "resnet200": (2048, 300, 5, "lamb", 0.001, 0.8, 0.02, 0.1, 1, 0.2, 0.9999),
}


def as_published(name, size):
    batch, _, r = recipe_for(name, (size, size))
    return (batch, r.epochs, r.warmup_epochs, r.optimizer, r.base_lr, r.layer_decay, r.weight_decay, r.mixup,
            r.repeats, r.drop_path, r.ema)  # fmt: skip


def test_the_recipes_are_the_published_ones():
    assert {name: as_published(name, 224) for name in RECIPES} == PUBLISHED
    assert as_published("convnext_large", 384) == (1024, 200, 20, "adamw", 6e-5, 0.7, 0.01, 0.8, 3, 0.5, 0.99995)


def test_every_field_of_a_recipe_is_set_and_the_config_of_a_run_repeats_it(tmp_path):
    for name in ("resnet10t", "convnext_atto", "resnet50"):
        asked = parse(["finetune", "a", "--data_path=x", "--weights=none", f"--model={name}", "--mixup=0", "--wd=0"])
        whole = asked.resolved(name, 0)
        assert None not in {value for group in whole.to_dict().values() for value in group.values()}
        assert (whole.recipe.mixup, whole.recipe.weight_decay) == (0, 0), "0 is a choice"
        (tmp_path / "config.toml").write_text(whole.to_toml())
        assert parse(["finetune", f"--config={tmp_path / 'config.toml'}"]) == whole


@pytest.mark.parametrize(
    ("name", "exponents"),  # by models/__init__.py of the published code
    [
        ("resnet50", {"conv1.weight": 7, "layer1.2.conv1.weight": 6, "layer2.1.conv1.weight": 5, "fc.weight": 0,
                      "layer2.2.conv1.weight": 4, "layer3.2.conv1.weight": 3, "layer3.5.conv1.weight": 2,
                      "layer4.0.conv1.weight": 1}),
        ("resnet101", {"bn1.weight": 13, "layer3.22.conv2.weight": 2, "layer4.2.conv3.weight": 1, "fc.bias": 0}),
        ("convnext_small", {"stem.0.weight": 13, "stages.0.blocks.2.conv_dw.weight": 12,
                            "stages.3.downsample.0.bias": 1,
                            "stages.1.downsample.1.weight": 11, "stages.2.downsample.1.weight": 10,
                            "stages.2.blocks.0.gamma": 10, "stages.2.blocks.26.mlp.fc1.weight": 2,
                            "stages.3.blocks.0.gamma": 1, "head.norm.weight": 0, "head.fc.weight": 0}),
        ("convnext_atto", {"stem.0.weight": 7, "stages.2.blocks.5.gamma": 3, "stages.3.blocks.1.gamma": 1}),
    ],
)  # fmt: skip
def test_layers_are_counted_as_published(name, exponents):
    with torch.device("meta"):
        model = timm.create_model(name)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, 0.5)
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert set(found) == set(names.values())
    for parameter, exponent in exponents.items():
        assert found[parameter]["lr_scale"] == pytest.approx(0.5**exponent), parameter
    assert all(group["decays"] == (p.dim() > 1) for group in groups for p in group["params"])


def test_other_networks_are_counted_as_timm_does_and_without_decay_all_rates_are_one():
    with torch.device("meta"):
        model = timm.create_model("efficientnet_b0")
    scales = {group["lr_scale"] for group in parameter_groups(model, 0.5)}
    assert len(scales) > 5
    assert {group["lr_scale"] for group in parameter_groups(model, 1.0)} == {1.0}


def test_votes_are_dinos():
    queries, bank = torch.eye(3)[:2], torch.eye(3)[[0, 0, 1, 2]]
    _, labels = nearest(queries, bank, torch.tensor([4, 4, 1, 0]), 2)
    assert labels[0].tolist() == [4, 4]
    found = votes(torch.tensor([[1.0, 0.5]]), torch.tensor([[2, 0]]), 3, 0.5)
    torch.testing.assert_close(found, torch.tensor([[2.718282, 0.0, 7.389056]]))
    assert nearest(queries, bank, torch.arange(4), 9)[0].shape == (2, 4)


def test_scores_count():
    scores = Scores(6, CPU)
    logits = torch.eye(6)[[0, 1, 1, 5]]
    logits[3, :5] = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    logits[2, 2] = 0.5
    scores.add(logits, torch.tensor([0, 1, 2, 0]))
    found = scores.accuracy()
    assert (found["top1"], found["images"]) == (50, 4)
    assert scores.matrix[2, 1] == scores.matrix[0, 5] == 1
    assert found["top5"] == 75, "class 0 is the sixth of the last image"


@pytest.mark.parametrize("classes", [3, 60])
def test_the_picture_is_drawn_for_few_and_for_many_classes(tmp_path, classes):
    draw_confusion(torch.eye(classes, dtype=torch.int64), [], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_without_strong_augmentation_images_stay_and_with_it_they_stay_images():
    _, _, recipe = recipe_for("resnet50", (32, 32))
    images = torch.randn(4, 3, 32, 32).clamp(-1.5, 1.5)
    recipe.__dict__.update(augment="none", erase=0.0)
    assert torch.equal(Augment(recipe, CPU)(images), images)
    for policy in ("trivial", "auto", "rand"):
        recipe.__dict__.update(augment=policy, erase=0.5)
        torch.manual_seed(0)
        changed = Augment(recipe, CPU)(images.clone())
        assert changed.shape == images.shape
        assert changed.isfinite().all()
        assert not torch.equal(changed, images)


def test_targets_are_smoothed_whether_or_not_images_are_mixed():
    _, _, recipe = recipe_for("resnet50", (32, 32))
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    mixed, targets = Mix(recipe, 5)(images.clone(), labels)
    assert not torch.equal(mixed, images)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    recipe.__dict__.update(mixup=0.0, cutmix=0.0)
    same, targets = Mix(recipe, 5)(images, labels)
    assert torch.equal(same, images)
    assert targets[2].tolist() == pytest.approx([0.02, 0.02, 0.92, 0.02, 0.02])


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


@pytest.mark.parametrize("kind", ["run folder", "checkpoint", "exported", "exported .pth", "published"])
def test_every_form_of_weights_gives_the_encoders_features(pretrained, tmp_path, kind):
    weights = read_weights(str(stored(pretrained, tmp_path, kind)))
    assert weights.network == ("" if kind in ("published", "exported .pth") else "resnet10t")
    images = torch.randn(2, 3, 64, 64)
    everything = torch.ones(2, 2, 2, dtype=torch.bool)
    expected = pretrained.encode(images, everything)[-1].mean((2, 3))
    torch.testing.assert_close(build_backbone("resnet10t", 0, weights)(images), expected, rtol=1e-4, atol=1e-5)
    classifier = build_classifier("resnet10t", 0, weights, 7, 0.0, (64, 64)).eval()
    pooled = classifier.forward_head(classifier.forward_features(images), pre_logits=True)
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)


def test_a_run_of_fewer_stages_leaves_the_later_levels_to_fine_tuning_and_features_are_of_its_last(tmp_path, caplog):
    model = build_spark("resnet10t", input_size=64, decoder_width=32, stages=2)
    settings = {"model": {"model": "resnet10t", "stages": 2}}
    write(tmp_path / "c.pth", {"model": model.state_dict(), "settings": settings})
    weights = read_weights(str(tmp_path / "c.pth"))
    assert weights.stages == 2
    assert build_backbone("resnet10t", 2, weights)(torch.zeros(1, 3, 64, 64)).shape == (1, 128)
    with caplog.at_level("INFO", "spark_fast"):
        classifier = build_classifier("resnet10t", 2, weights, 3, 0.0, (64, 64))
    assert "these begin anew: fc.bias, fc.weight, layer3" in caplog.text
    assert torch.equal(classifier.layer2[0].conv1.weight, model.state_dict()["encoder.network.layer2.0.conv1.weight"])
    with pytest.raises(CheckpointError, match=r"missing: layer3"):
        build_classifier("resnet10t", 0, weights, 3, 0.0, (64, 64))
