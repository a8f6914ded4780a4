"""Fine-tuning recipes against the published tables."""

import pytest

from spark_fast.errors import SettingsError
from spark_fast.evaluation.eval_settings import parse
from spark_fast.evaluation.recipes import RECIPES, recipe_for
from spark_fast.pipelines.transforms.bands.statistics import Statistics

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


def test_a_recipe_is_the_callers_own():
    recipe_for("resnet50", (224, 224))[2].mixup = 9.0
    assert as_published("resnet50", 224) == PUBLISHED["resnet50"]


def test_what_is_no_photograph_is_not_augmented_as_one():
    assert recipe_for("resnet50", (224, 224), photographs=False)[2].augment == "none"
    assert recipe_for("convnext_base", (384, 384), photographs=False)[2].augment == "none"
    words = ["finetune", "a", "--data_path=x", "--weights=none", "--model=resnet50"]
    asked = parse([*words, "--in_chans=4"])
    assert asked.resolved("resnet50", 0, 4).recipe == recipe_for("resnet50", (224, 224), False)[2]
    with pytest.raises(
        SettingsError, match="--augment rand is for photographs, and the images have 1 channel and --scale auto: "
    ):
        parse([*words, "--augment=rand"]).resolved("resnet50", 0, 1)


def test_three_channels_that_were_scaled_are_no_photographs():
    words = ["finetune", "a", "--data_path=x", "--weights=none", "--model=resnet50"]
    none = recipe_for("resnet50", (224, 224), photographs=False)[2]
    assert parse([*words, "--scale=dtype"]).resolved("resnet50", 0, 3).recipe == none
    known = Statistics("percentile", "uint16", (0.5,) * 3, (0.2,) * 3, (0.0,) * 3, (9.0,) * 3)
    assert parse(words).resolved("resnet50", 0, 3, known).recipe == none
    assert parse(words).resolved("resnet50", 0, 3).recipe.augment == "trivial"
    with pytest.raises(
        SettingsError, match=r"--augment rand is for photographs, and .* 3 channels and --scale percent"
    ):
        parse([*words, "--augment=rand"]).resolved("resnet50", 0, 3, known)


def test_every_field_of_a_recipe_is_set_and_the_config_of_a_run_repeats_it(tmp_path):
    for name in ("resnet10t", "convnext_atto", "resnet50"):
        asked = parse(["finetune", "a", "--data_path=x", "--weights=none", f"--model={name}", "--mixup=0", "--wd=0"])
        whole = asked.resolved(name, 0)
        assert None not in {value for group in whole.to_dict().values() for value in group.values()}
        assert (whole.recipe.mixup, whole.recipe.weight_decay) == (0, 0), "0 is a choice"
        (tmp_path / "config.toml").write_text(whole.to_toml())
        assert parse(["finetune", f"--config={tmp_path / 'config.toml'}"]) == whole
